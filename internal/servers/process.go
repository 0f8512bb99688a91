package servers

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// process is a line of /proc.
type process struct {
	pid, parent int
	state       byte   // as in proc_pid_stat(5): T is stopped
	began       string // tells it from a later process with its number
	argv        []string
}

// leads reports whether the process is the server itself, which stops the others
// when it is told to stop. The mark is an argument that the server ignores.
func (p process) leads(id string) bool {
	return slices.Contains(p.argv, postgresMark(id)) || slices.Contains(p.argv, rabbitMark(id))
}

// follows reports whether the process is one that the server's leader does not
// take with it when it dies: a PostgreSQL backend, or epmd.
func (p process) follows(id string) bool {
	return strings.HasPrefix(p.argv[0], postgresTitle(id)) || p.argv[0] == epmdTitle(id)
}

// processes returns those of the server with that id, with their descendants,
// oldest first. A command line shows whose a process is. Pid files do not: they
// go stale, and their numbers are used again. Environment and working directory
// would do, but root in a container may not read those of another user.
func processes(id string) ([]process, error) {
	all, err := listProcesses()
	if err != nil {
		return nil, err
	}
	ours := make(map[int]bool)
	var found []process
	for grown := true; grown; {
		grown = false
		for _, p := range all {
			if !ours[p.pid] && (ours[p.parent] || p.leads(id) || p.follows(id)) {
				ours[p.pid], grown = true, true
				found = append(found, p)
			}
		}
	}
	slices.SortFunc(found, func(a, b process) int { return a.pid - b.pid })
	return found, nil
}

func listProcesses() ([]process, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var all []process
	for _, dir := range dirs {
		if p, ok := readProcess(dir); ok {
			all = append(all, p)
		}
	}
	return all, nil
}

// readProcess reports false for a process that has ended, also as a zombie that
// nobody has waited for. A command line may be empty for a moment: none at all
// has argv[0] "", as in kernel threads.
func readProcess(dir string) (process, bool) {
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return process{}, false
	}
	command, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	if err != nil {
		return process{}, false
	}
	// The second field is the name in brackets, which may itself hold brackets.
	head, tail, _ := strings.Cut(string(stat), " ")
	fields := strings.Fields(tail[strings.LastIndexByte(tail, ')')+1:])
	pid, err := strconv.Atoi(head)
	if err != nil || len(fields) < 20 || fields[0] == "X" {
		return process{}, false
	}
	// A killed process is a zombie as soon as its first thread has ended, while the
	// others may still hold its sockets.
	if threads := fields[17]; fields[0] == "Z" && (threads == "0" || threads == "1") {
		return process{}, false
	}
	parent, err := strconv.Atoi(fields[1])
	argv := strings.Split(strings.TrimRight(string(command), "\x00"), "\x00")
	return process{pid: pid, parent: parent, state: fields[0][0], began: fields[19], argv: argv}, err == nil
}

// signal sends sig to all of them; one that has ended meanwhile is no error.
func signal(ps []process, sig syscall.Signal) error {
	var errs []error
	for _, p := range ps {
		if err := syscall.Kill(p.pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
			errs = append(errs, fmt.Errorf("signal %d to process %d: %w", sig, p.pid, err))
		}
	}
	return errors.Join(errs...)
}

func (p process) lives() bool {
	now, ok := readProcess(filepath.Join("/proc", strconv.Itoa(p.pid)))
	return ok && now.began == p.began
}

// signalLimit is for a process that the kernel is just busy with.
const signalLimit = 10 * time.Second

// signalUntil repeats sig to the processes that are not done, since one may be
// forked while the others are being signalled.
func signalUntil(id string, sig syscall.Signal, done func(process) bool) error {
	for deadline := time.Now().Add(signalLimit); ; time.Sleep(time.Millisecond) {
		ps, err := processes(id)
		if err != nil {
			return err
		}
		ps = slices.DeleteFunc(ps, done)
		if len(ps) == 0 {
			return nil
		}
		if err := signal(ps, sig); err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("process %d resists signal %d", ps[0].pid, sig)
		}
	}
}

// end kills these processes and returns when they are gone. It does not look for
// others: orphans can be found no more.
func end(ps []process) error {
	for deadline := time.Now().Add(signalLimit); ; time.Sleep(time.Millisecond) {
		ps = slices.DeleteFunc(ps, func(p process) bool { return !p.lives() })
		if len(ps) == 0 {
			return nil
		}
		if err := signal(ps, syscall.SIGKILL); err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("process %d cannot be killed", ps[0].pid)
		}
	}
}
