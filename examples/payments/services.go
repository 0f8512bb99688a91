package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"syscall"
	"time"
)

// services are the processes of the demo: four services, two relays for the orders and one
// for the ledger.
type services struct {
	demo                            *demo
	address                         string // of the order service
	orders, ledger, receipts, naive *process
	relays                          [3]*process
}

// relayOf names the service whose outbox a relay reads.
var relayOf = [3]string{"orders", "orders", "ledger"}

// process is a child. Its exit is awaited from the start, so that it can be asked
// for and no child stays behind.
type process struct {
	cmd    *exec.Cmd
	exited chan struct{}
}

// databaseURL is url for another database of the same server.
func databaseURL(server, database string) (string, error) {
	u, err := url.Parse(server)
	if err != nil || u.Scheme == "" {
		return "", errors.New("DATABASE_URL: want a URL, postgres://user:password@host:port/database")
	}
	u.Path = "/" + database
	return u.String(), nil
}

func (s *services) url() string { return "http://" + s.address + "/orders" }

// start returns when orders can be placed.
func (s *services) start(ctx context.Context) error {
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	s.address = free.Addr().String()
	if err := free.Close(); err != nil {
		return err
	}
	if s.orders, err = s.service("orders"); err != nil {
		return err
	}
	if err := s.startConsumers(); err != nil {
		return err
	}
	for i := range s.relays {
		if err := s.startRelay(i); err != nil {
			return err
		}
	}
	return await(ctx, 10*time.Second, "the order service listens", func() bool {
		conn, err := net.Dial("tcp", s.address)
		if err != nil {
			return false
		}
		return conn.Close() == nil
	})
}

func (s *services) startConsumers() (err error) {
	if s.ledger, err = s.service("ledger"); err != nil {
		return err
	}
	if s.receipts, err = s.service("receipts"); err != nil {
		return err
	}
	s.naive, err = s.service("naive")
	return err
}

// stopConsumers lets them finish what is in hand.
func (s *services) stopConsumers() error {
	return errors.Join(s.ledger.stop(), s.receipts.stop(), s.naive.stop())
}

// startRelay sets short times, so that what a fault costs is soon over. With the
// defaults all would be right too, only later.
func (s *services) startRelay(i int) (err error) {
	s.relays[i], err = s.run(fmt.Sprintf("relay-%d", i+1), relayOf[i], s.demo.relayPath,
		"run", "--lease=4s", "--confirm-timeout=4s", "--write-timeout=4s")
	return err
}

// stopRelays returns when what they had in hand is confirmed.
func (s *services) stopRelays() (err error) {
	for _, relay := range s.relays {
		err = errors.Join(err, relay.stop())
	}
	return err
}

func (s *services) all() []*process {
	return append([]*process{s.naive, s.receipts, s.ledger, s.orders}, s.relays[:]...)
}

// service runs this program as the service of that name, with its own database.
func (s *services) service(name string) (*process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return s.run(name, name, self, name)
}

func (s *services) run(name, database, program string, args ...string) (*process, error) {
	url, err := databaseURL(s.demo.databaseURL, "txbox_demo_"+database)
	if err != nil {
		return nil, err
	}
	log, err := s.demo.logFile(name)
	if err != nil {
		return nil, err
	}
	defer log.Close() // the child has its own
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), "DATABASE_URL="+url, "AMQP_URL="+s.demo.amqpURL, "LISTEN="+s.address)
	cmd.Stdout, cmd.Stderr = log, log
	// A process group of its own: Ctrl-C is for the demo, which then ends the others.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	p := &process{cmd: cmd, exited: make(chan struct{})}
	go func() {
		cmd.Wait() // how it ended is in cmd.ProcessState
		close(p.exited)
	}()
	return p, nil
}

// stop ends a process with SIGTERM, and waits for it.
func (p *process) stop() error {
	p.cmd.Process.Signal(syscall.SIGTERM) // fails if it has exited: seen below
	select {
	case <-p.exited:
	case <-time.After(30 * time.Second):
		p.kill()
		return fmt.Errorf("%s did not stop within 30 s", p.cmd)
	}
	if !p.cmd.ProcessState.Success() {
		return fmt.Errorf("%s: %s", p.cmd, p.cmd.ProcessState)
	}
	return nil
}

// kill ends a process with SIGKILL.
func (p *process) kill() {
	if p == nil {
		return
	}
	p.cmd.Process.Kill()
	<-p.exited
}

// alive reports whether all run, and which does not.
func (s *services) alive() error {
	for _, p := range s.all() {
		select {
		case <-p.exited:
			return fmt.Errorf("%s has exited: %s", p.cmd, p.cmd.ProcessState)
		default:
		}
	}
	return nil
}

func (s *services) kill() {
	for _, p := range s.all() {
		p.kill()
	}
}

// await polls until done reports true.
func await(ctx context.Context, limit time.Duration, what string, done func() bool) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not within %s: %s", limit, what))
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
	return nil
}
