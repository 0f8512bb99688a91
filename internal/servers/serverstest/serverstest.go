// Package serverstest gives a test servers of its own, to kill, pause and restart.
// Tests that leave the server alone share those of "make up" instead: RabbitMQ
// takes some 5 s to start.
package serverstest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/txbox/txbox/internal/servers"
)

// stopLimit bounds the removal of a server.
const stopLimit = time.Minute

// Postgres starts a server and removes it when the test ends. It fails the test
// if there can be none.
func Postgres(t testing.TB) *servers.Postgres {
	t.Helper()
	server := &servers.Postgres{Dir: filepath.Join(Folder(t), "postgres")}
	start(t, server)
	return server
}

// RabbitMQ starts a node and removes it when the test ends. It fails the test if
// there can be none.
func RabbitMQ(t testing.TB) *servers.RabbitMQ {
	t.Helper()
	server := &servers.RabbitMQ{Dir: filepath.Join(Folder(t), "rabbitmq")}
	start(t, server)
	return server
}

type server interface {
	Start(context.Context) error
	Remove(context.Context) error
}

func start(t testing.TB, s server) {
	t.Helper()
	t.Cleanup(func() {
		// Not the test's context: that has ended by now.
		ctx, cancel := context.WithTimeout(context.Background(), stopLimit)
		defer cancel()
		if err := s.Remove(ctx); err != nil {
			t.Error(err)
		}
	})
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// prefix is followed by the number of the process whose test it is.
const prefix = "txbox-test-"

// Folder is t.TempDir, but open to the user that the servers run as, and with a
// name that tells whether its test still runs.
func Folder(t testing.TB) string {
	t.Helper()
	if err := Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", fmt.Sprintf("%s%d-", prefix, os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// Sweep removes the servers of tests that were killed before they could.
func Sweep(ctx context.Context) error {
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), prefix+"*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, dir := range dirs {
		if abandoned(dir) {
			errs = append(errs,
				(&servers.Postgres{Dir: filepath.Join(dir, "postgres")}).Remove(ctx),
				(&servers.RabbitMQ{Dir: filepath.Join(dir, "rabbitmq")}).Remove(ctx),
				os.RemoveAll(dir))
		}
	}
	return errors.Join(errs...)
}

// abandoned reports whether dir is this user's and its test has ended.
func abandoned(dir string) bool {
	var pid int
	if _, err := fmt.Sscanf(filepath.Base(dir), prefix+"%d-", &pid); err != nil {
		return false
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); !errors.Is(err, os.ErrNotExist) {
		return false
	}
	info, err := os.Lstat(dir)
	return err == nil && info.IsDir() && ownedByUs(info)
}

func ownedByUs(info os.FileInfo) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(stat.Uid) == os.Getuid()
}
