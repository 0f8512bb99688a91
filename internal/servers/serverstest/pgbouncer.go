package serverstest

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/txbox/txbox/internal/servers"
)

// Pgbouncer starts a pooler in transaction mode before a database, with that many
// sessions of its own, and ends it with the test. It returns the database's URL
// through the pooler. The package is installed if it is missing.
func Pgbouncer(t testing.TB, databaseURL string, sessions int) string {
	t.Helper()
	program, err := exec.LookPath("/usr/sbin/pgbouncer")
	if err != nil {
		if err := servers.Install(t.Context(), "pgbouncer"); err != nil {
			t.Fatal(err)
		}
		program = "/usr/sbin/pgbouncer"
	}
	port, err := servers.FreePort(1)
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	password, _ := u.User.Password()
	config := fmt.Sprintf(`[databases]
* = host=%s port=%s user=%s password=%s
[pgbouncer]
pool_mode = transaction
default_pool_size = %d
listen_addr = 127.0.0.1
listen_port = %d
unix_socket_dir =
auth_type = any
`, u.Hostname(), u.Port(), u.User.Username(), password, sessions, port)
	if os.Getuid() == 0 { // which it refuses to run as
		config += "user = postgres\n"
	}
	file := filepath.Join(Folder(t), "pgbouncer.ini")
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "-q", file)
	cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait() // it was killed
	})
	u.Host = fmt.Sprintf("127.0.0.1:%d", port)
	deadline := time.Now().Add(20 * time.Second)
	for {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		err := servers.CheckDatabase(ctx, u.String())
		cancel()
		if err == nil {
			return u.String()
		}
		if time.Now().After(deadline) {
			t.Fatalf("pgbouncer: %v", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
