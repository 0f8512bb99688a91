package main

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/txbox/txbox/internal/testenv"
)

// A short run on servers that others use too: the relay is killed, the broker is
// left alone.
func TestLedgerIsExactWhileTheRelayIsKilled(t *testing.T) {
	dir := t.TempDir()
	build := exec.CommandContext(t.Context(), "go", "build", "-o", dir, "github.com/txbox/txbox/cmd/relay", ".")
	if output, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%s: %s", err, output)
	}
	demo := exec.CommandContext(testenv.Context(t), filepath.Join(dir, "payments"), "demo",
		"-relay", filepath.Join(dir, "relay"), "-logs", filepath.Join(dir, "logs"), "-orders", "1500", "-rate", "150")
	demo.Env = append(demo.Environ(), "DATABASE_URL="+testenv.DatabaseURL(t), "AMQP_URL="+testenv.AMQPURL(t))
	demo.WaitDelay = time.Second
	output, err := demo.CombinedOutput()
	if err != nil {
		t.Fatalf("%s:\n%s", err, output)
	}
	for _, want := range []string{"a relay killed with -9 (5 of 5)", "exactly once"} {
		if !strings.Contains(string(output), want) {
			t.Errorf("%q is not in:\n%s", want, output)
		}
	}
}
