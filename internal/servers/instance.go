package servers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// instance is one server, of either kind, as the verbs in this file see it.
type instance struct {
	place
	port  *int
	ports int // how many successive ones it uses
	stop  syscall.Signal
	url   func(port int) string
	// launch initialises the home if need be and starts the server; the channel
	// tells when it has ended.
	launch func(context.Context, instance) (ended <-chan error, err error)
	// check is nil if the server behind url does its work.
	check func(ctx context.Context, url string) error
}

// finder returns the instance of a server's Dir.
type finder func() (instance, error)

// do runs a method's work and names it in the error.
func (find finder) do(what string, work func(instance) error) error {
	s, err := find()
	if err == nil {
		err = work(s)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// end is do where there may be nothing to end: no user, so no package, so no server.
func (find finder) end(what string, work func(instance) error) error {
	if _, err := find(); errors.As(err, new(user.UnknownUserError)) {
		return nil
	}
	return find.do(what, work)
}

const (
	startLimit  = 90 * time.Second
	wakeLimit   = 20 * time.Second // until a server that runs must serve
	stopLimit   = 20 * time.Second
	probeLimit  = 2 * time.Second
	probePeriod = 20 * time.Millisecond
	logName     = "server.log"
)

// start leaves a server alone that serves. One that runs without serving may be
// paused or starting. If it still does not serve after a while, it hangs, or its
// files were deleted under it: then, as after a crash, it is started anew.
func (s instance) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	if err := s.create(); err != nil {
		return err
	}
	given := *s.port != 0
	*s.port = s.knownPort()
	if leaders, err := s.leaders(); err != nil {
		return err
	} else if len(leaders) > 0 && *s.port != 0 && s.wakes(ctx) {
		return nil
	}
	if err := s.stopAll(ctx); err != nil {
		return err
	}
	if err := s.choosePort(given); err != nil {
		return err
	}
	ended, err := s.launch(ctx, s)
	if err == nil {
		err = s.await(ctx, ended)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("%w\n%s", err, s.logEnd()), s.kill())
	}
	return nil
}

func (s instance) leaders() ([]process, error) {
	ps, err := processes(s.id)
	return slices.DeleteFunc(ps, func(p process) bool { return !p.leads(s.id) }), err
}

func (s instance) wakes(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, wakeLimit)
	defer cancel()
	return s.resume() == nil && s.await(ctx, nil) == nil
}

// await returns when the server serves or has ended.
func (s instance) await(ctx context.Context, ended <-chan error) error {
	tick := time.NewTicker(probePeriod)
	defer tick.Stop()
	for {
		err := s.serves(ctx)
		if err == nil {
			return nil
		}
		select {
		case exit := <-ended:
			return fmt.Errorf("the server ended: %v", exit)
		case <-ctx.Done():
			return fmt.Errorf("the server does not serve: %w: %w", context.Cause(ctx), err)
		case <-tick.C:
		}
	}
}

// ready also asks whose server it is that serves: the folder may be a copy of
// another, which remembers the same port.
func (s instance) ready(ctx context.Context) error {
	leaders, err := s.leaders()
	if err != nil {
		return err
	}
	if len(leaders) == 0 {
		return errors.New("not running")
	}
	return s.serves(ctx)
}

func (s instance) serves(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	return s.check(ctx, s.url(s.knownPort()))
}

// choosePort keeps a port that the caller gave. One of our own choice is given
// up if somebody else listens there now.
func (s instance) choosePort(given bool) error {
	if *s.port == 0 || !portsFree(*s.port, s.ports) {
		if given {
			return fmt.Errorf("somebody else listens on one of %d ports from %d on", s.ports, *s.port)
		}
		port, err := FreePort(s.ports)
		if err != nil {
			return err
		}
		*s.port = port
	}
	return s.write("port", strconv.Itoa(*s.port))
}

// knownPort is zero before the first start. Only Start changes the caller's Port:
// set by others it would look like one that the caller insists on.
func (s instance) knownPort() int {
	if *s.port != 0 {
		return *s.port
	}
	port, _ := strconv.Atoi(s.read("port"))
	return port
}

// stopAll tells the leader to stop, and takes away what does not end with it.
func (s instance) stopAll(ctx context.Context) error {
	if err := s.resume(); err != nil { // a stopped process would not hear the signal
		return err
	}
	all, err := processes(s.id)
	if err != nil {
		return err
	}
	leaders := slices.DeleteFunc(slices.Clone(all), func(p process) bool { return !p.leads(s.id) })
	if err := signal(leaders, s.stop); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, stopLimit)
	defer cancel()
	tick := time.NewTicker(probePeriod)
	defer tick.Stop()
	for ctx.Err() == nil && slices.ContainsFunc(leaders, process.lives) {
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
	return errors.Join(s.kill(), end(all))
}

// kill stops all processes before it ends them, so that none can be forked behind
// its back and survive as an orphan that nobody can find.
func (s instance) kill() error {
	if err := s.pause(); err != nil {
		return err
	}
	all, err := processes(s.id)
	if err != nil {
		return err
	}
	return end(all)
}

func (s instance) pause() error {
	return signalUntil(s.id, syscall.SIGSTOP, func(p process) bool { return p.state == 'T' })
}

func (s instance) resume() error {
	return signalUntil(s.id, syscall.SIGCONT, func(p process) bool { return p.state != 'T' })
}

// remove stops the server and deletes all its files.
func (s instance) remove(ctx context.Context) error {
	if err := s.stopAll(ctx); err != nil {
		return err
	}
	return errors.Join(os.RemoveAll(s.home), os.RemoveAll(s.dir))
}

// command runs as the server's user, in its home, with an environment that owes
// nothing to the caller's: a developer's PGDATA or ERL_FLAGS must not reach it.
func (s instance) command(ctx context.Context, env []string, argv ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = s.home
	cmd.Env = append([]string{"HOME=" + s.home, "LC_ALL=C.UTF-8", "PATH=" + searchPath()}, env...)
	cmd.SysProcAttr = s.owner.attributes()
	cmd.WaitDelay = time.Second
	return cmd
}

// run returns what the command printed, also within its error.
func (s instance) run(cmd *exec.Cmd) (string, error) {
	output, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Path), err, strings.TrimSpace(string(output)))
	}
	return string(output), err
}

// detach starts a server that outlives this process and is out of reach of its
// terminal's Ctrl-C. The command must not have a context that ends.
func (s instance) detach(cmd *exec.Cmd) (<-chan error, error) {
	log, err := os.OpenFile(s.path(logName), os.O_CREATE|os.O_APPEND|os.O_WRONLY|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	if err := s.owner.giveFile(log); err != nil {
		return nil, err
	}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr.Setsid = true
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // else a server that ends first stays as a zombie
	return ended, nil
}

// logEnd is the end of the server's log, for errors.
func (s instance) logEnd() string {
	lines := strings.Split(s.read(logName), "\n")
	return s.path(logName) + ":\n" + strings.Join(lines[max(0, len(lines)-15):], "\n")
}
