package servers_test

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func removeAtEnd(t *testing.T, s server) {
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := s.Remove(ctx); err != nil {
			t.Error(err)
		}
	})
}

// leftovers finds processes by their working directory and home, which package
// servers does not look at.
func leftovers(t *testing.T, dir string) []string {
	t.Helper()
	folders, err := filepath.Glob("/proc/[0-9]*")
	must(t, "list processes", err)
	var found []string
	for _, folder := range folders {
		cwd, _ := os.Readlink(filepath.Join(folder, "cwd"))
		environ, _ := os.ReadFile(filepath.Join(folder, "environ"))
		if strings.HasPrefix(cwd+"/", dir+"/") || strings.Contains(string(environ), "HOME="+dir+"\x00") {
			command, _ := os.ReadFile(filepath.Join(folder, "cmdline"))
			found = append(found, filepath.Base(folder)+" "+strings.ReplaceAll(string(command), "\x00", " "))
		}
	}
	return found
}

func listensBeyondLoopback(t *testing.T, port int) bool {
	t.Helper()
	addresses, err := net.InterfaceAddrs()
	must(t, "list addresses", err)
	for _, address := range addresses {
		ip, _, err := net.ParseCIDR(address.String())
		if err != nil || ip.IsLoopback() || ip.IsLinkLocalUnicast() {
			continue
		}
		conn, err := net.DialTimeout("tcp", net.JoinHostPort(ip.String(), strconv.Itoa(port)), time.Second)
		if err == nil {
			conn.Close()
			return true
		}
	}
	return false
}

// ownerOf is nil, which means ourselves, if we may not choose.
func ownerOf(t *testing.T, dir string) *syscall.Credential {
	t.Helper()
	me, err := user.Current()
	must(t, "look up user", err)
	if me.Uid != "0" {
		return nil
	}
	var stat syscall.Stat_t
	must(t, "stat", syscall.Stat(dir, &stat))
	return &syscall.Credential{Uid: stat.Uid, Gid: stat.Gid}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

func must(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

func eventually(t *testing.T, limit time.Duration, what string, done func() bool) {
	t.Helper()
	deadline := time.After(limit)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not within %s: %s", limit, what)
		}
	}
}
