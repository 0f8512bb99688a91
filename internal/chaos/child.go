package main

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"
)

// child is a process of the run: this program in another role. It is started anew each time
// it has died.
type child struct {
	name      string
	args, env []string
	log       string // file

	starts int
	cmd    *exec.Cmd
	exited chan struct{} // closed when the process is gone
}

// start starts the process, with more in its environment.
func (c *child) start(env ...string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	log, err := os.OpenFile(c.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close() // the process has its own
	c.starts++
	fmt.Fprintln(log, "chaos: start", c.starts, env)
	c.cmd = exec.Command(self, append(c.args, fmt.Sprint("-incarnation=", c.starts))...)
	c.cmd.Env = append(append(os.Environ(), c.env...), env...)
	c.cmd.Stdout, c.cmd.Stderr = log, log
	// A group of its own: Ctrl-C is for the run, which then ends the others. They do not
	// outlive it, however it ends.
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := c.cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", c.name, err)
	}
	c.exited = make(chan struct{})
	go func(cmd *exec.Cmd, exited chan struct{}) {
		_ = cmd.Wait() // how it ended is in cmd.ProcessState
		close(exited)
	}(c.cmd, c.exited)
	return nil
}

// kill ends the process with SIGKILL.
func (c *child) kill() {
	if c.cmd != nil {
		_ = c.cmd.Process.Kill() // it may be gone
		<-c.exited
	}
}

// signal sends SIGSTOP or SIGCONT.
func (c *child) signal(s syscall.Signal) error { return c.cmd.Process.Signal(s) }

// stopLimit is more than any role takes to stop, with the servers there.
const stopLimit = 30 * time.Second

// stop ends the process with SIGTERM, and says what is wrong if it does not end well.
func (c *child) stop() error {
	_ = c.cmd.Process.Signal(syscall.SIGTERM) // it may be gone: seen below
	if !c.awaitExit(stopLimit) {
		c.kill()
		return fmt.Errorf("%s did not stop within %s", c.name, stopLimit)
	}
	if !c.cmd.ProcessState.Success() {
		return fmt.Errorf("%s: %s", c.name, c.cmd.ProcessState)
	}
	return nil
}

// awaitExit reports whether the process is gone within limit.
func (c *child) awaitExit(limit time.Duration) bool {
	select {
	case <-c.exited:
		return true
	case <-time.After(limit):
		return false
	}
}

// died returns how the process has ended by itself, nil if it runs.
func (c *child) died() error {
	select {
	case <-c.exited:
		return fmt.Errorf("%s has ended by itself: %s", c.name, c.cmd.ProcessState)
	default:
		return nil
	}
}
