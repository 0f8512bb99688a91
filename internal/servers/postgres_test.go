package servers_test

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/txbox/txbox/internal/servers"
	"github.com/txbox/txbox/internal/servers/serverstest"
)

func TestServerOutlivesTheProcessThatStartedIt(t *testing.T) {
	t.Parallel()
	server := &servers.Postgres{Dir: filepath.Join(serverstest.Folder(t), "postgres")}
	removeAtEnd(t, server)
	self, err := os.Executable()
	must(t, "find this program", err)
	starter := exec.Command(self)
	starter.Env = append(os.Environ(), startVariable+"="+server.Dir)
	starter.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if output, err := starter.CombinedOutput(); err != nil {
		t.Fatalf("start in another process: %v: %s", err, output)
	}
	if err := syscall.Kill(-starter.Process.Pid, syscall.SIGKILL); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("the server is in the process group of its starter: %v", err)
	}
	must(t, "serve after its starter's end", server.Ready(t.Context()))
}

func TestStartGivesWayOnARememberedPortAndInsistsOnAGivenOne(t *testing.T) {
	t.Parallel()
	server := serverstest.Postgres(t)
	must(t, "stop", server.Stop(t.Context()))
	listener, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(server.Port)))
	must(t, "take the port", err)
	defer listener.Close()
	if err := server.Start(t.Context()); err == nil {
		t.Error("started on a port that somebody else has")
	}
	again := &servers.Postgres{Dir: server.Dir}
	if again.URL() != server.URL() || again.Ready(t.Context()) == nil {
		t.Error("a stopped server has no URL, or is ready")
	}
	must(t, "start on another port", again.Start(t.Context()))
	if again.Port == server.Port {
		t.Error("the port is still the same")
	}
}

func TestStartIsNotFooledByAPidThatIsUsedAgain(t *testing.T) {
	t.Parallel()
	server := serverstest.Postgres(t)
	must(t, "kill", server.Kill())
	stranger := exec.Command("sleep", "600")
	stranger.SysProcAttr = &syscall.SysProcAttr{Credential: ownerOf(t, server.Dir)}
	must(t, "start another process of that user", stranger.Start())
	defer func() { stranger.Process.Kill(); stranger.Wait() }()
	file := filepath.Join(server.Dir, "data", "postmaster.pid")
	content, err := os.ReadFile(file)
	must(t, "read pid file", err)
	_, rest, _ := strings.Cut(string(content), "\n")
	must(t, "write pid file", os.WriteFile(file, []byte(strconv.Itoa(stranger.Process.Pid)+"\n"+rest), 0o600))
	must(t, "start", server.Start(t.Context()))
}

func TestStopFindsABusySessionWhosePostmasterHasCrashed(t *testing.T) {
	t.Parallel()
	server := serverstest.Postgres(t)
	go func() {
		if conn, err := pgx.Connect(context.Background(), server.URL()); err == nil {
			conn.Exec(context.Background(), "DO $$ BEGIN LOOP END LOOP; END $$") // ends with the server
		}
	}()
	content, err := os.ReadFile(filepath.Join(server.Dir, "data", "postmaster.pid"))
	must(t, "read pid file", err)
	first, _, _ := strings.Cut(string(content), "\n")
	postmaster, err := strconv.Atoi(first)
	must(t, "parse pid", err)
	eventually(t, time.Minute, "the session is busy", func() bool {
		other, err := pgx.Connect(t.Context(), server.URL())
		must(t, "connect", err)
		defer other.Close(t.Context())
		var busy bool
		must(t, "look", other.QueryRow(t.Context(), "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE query LIKE 'DO %')").Scan(&busy))
		return busy
	})
	must(t, "kill the postmaster alone", syscall.Kill(postmaster, syscall.SIGKILL))
	must(t, "stop", server.Stop(t.Context()))
	if left := leftovers(t, server.Dir); len(left) > 0 {
		t.Errorf("processes %s live on", left)
	}
}

func TestFilesLieElsewhereIfTheServerCannotUseTheFolder(t *testing.T) {
	t.Parallel()
	clone := filepath.Join(serverstest.Folder(t), "a clone") // for any user
	must(t, "make folder", os.Mkdir(clone, 0o700))           // for root's
	server := &servers.Postgres{Dir: filepath.Join(clone, ".dev", "postgres")}
	removeAtEnd(t, server)
	must(t, "start", server.Start(t.Context()))
	home, err := os.Readlink(server.Dir)
	must(t, "read link", err)
	if filepath.Dir(home) != "/var/tmp" {
		t.Errorf("files lie in %s", home)
	}

	copied := &servers.Postgres{Dir: filepath.Join(clone, "copy", "postgres")}
	removeAtEnd(t, copied)
	must(t, "make folder", os.Mkdir(filepath.Dir(copied.Dir), 0o755))
	must(t, "copy the link", os.Symlink(home, copied.Dir))
	must(t, "start the copy", copied.Start(t.Context()))
	if copied.Port == server.Port {
		t.Error("a copied link leads to the server of the original")
	}
	must(t, "remove", server.Remove(t.Context()))
	if exists(home) || exists(server.Dir) || len(leftovers(t, home)) > 0 {
		t.Error("Remove leaves something behind")
	}
	must(t, "serve when the original is removed", copied.Ready(t.Context()))
}
