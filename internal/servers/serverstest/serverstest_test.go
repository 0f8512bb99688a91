package serverstest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/txbox/txbox/internal/servers"
)

func TestSweepRemovesServersOfTestsThatWereKilled(t *testing.T) {
	t.Setenv("TMPDIR", Folder(t)) // other tests sweep too
	ended := exec.Command("true")
	if err := ended.Run(); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", fmt.Sprintf("%s%d-", prefix, ended.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	abandoned := &servers.Postgres{Dir: filepath.Join(dir, "postgres")}
	if err := abandoned.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	used := Postgres(t) // sweeps
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the folder is still there: %v", err)
	}
	if abandoned.Ready(t.Context()) == nil {
		t.Error("the abandoned server still serves")
	}
	if err := Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := used.Ready(t.Context()); err != nil {
		t.Errorf("the server of a test that runs was swept away: %v", err)
	}
}
