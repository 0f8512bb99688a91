package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/txbox/txbox/internal/testenv"
)

// program is the binary under test.
var program string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "relay")
	if err == nil {
		program = filepath.Join(dir, "relay")
		build := exec.Command("go", "build", "-race", "-o", program, ".")
		build.Stderr = os.Stderr
		err = build.Run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "build the relay:", err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		os.RemoveAll(dir)
		os.Exit(code)
	}))
}

// started is a running relay.
type started struct {
	*exec.Cmd
	output *output
	exited chan struct{}
}

// start runs the program with nothing of txbox in its environment but variables.
func start(t *testing.T, variables []string, args ...string) *started {
	t.Helper()
	return startProgram(t, program, variables, args...)
}

func startProgram(t *testing.T, program string, variables []string, args ...string) *started {
	t.Helper()
	cmd := exec.CommandContext(testenv.Context(t), program, args...)
	for _, variable := range os.Environ() {
		name, _, _ := strings.Cut(variable, "=")
		if !strings.HasPrefix(name, "TXBOX_") && !strings.HasPrefix(name, "PG") && name != "DATABASE_URL" && name != "AMQP_URL" {
			cmd.Env = append(cmd.Env, variable)
		}
	}
	cmd.Env = append(cmd.Env, variables...)
	s := &started{Cmd: cmd, output: &output{}, exited: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = s.output, s.output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		cmd.Wait() // its result is in ProcessState
		close(s.exited)
	}()
	t.Cleanup(func() { cmd.Process.Kill(); <-s.exited })
	return s
}

// exit waits for the end of the program and returns its exit code.
func (s *started) exit(t *testing.T) int {
	t.Helper()
	select {
	case <-s.exited:
	case <-time.After(time.Minute):
		t.Fatalf("it does not end:\n%s", s.output)
	}
	return s.ProcessState.ExitCode()
}

func (s *started) signal(t *testing.T, sig syscall.Signal) {
	t.Helper()
	if err := s.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Fatal(err)
	}
}

// run returns what the program printed, and its exit code.
func runProgram(t *testing.T, variables []string, args ...string) (string, int) {
	t.Helper()
	s := start(t, variables, args...)
	code := s.exit(t)
	return s.output.String(), code
}

// output may be read while the program writes.
type output struct {
	mu     sync.Mutex
	buffer bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buffer.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buffer.String()
}

func (o *output) has(t *testing.T, want string) {
	t.Helper()
	testenv.Eventually(t, 20*time.Second, fmt.Sprintf("%q in the output", want), func() bool {
		return strings.Contains(o.String(), want)
	})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
