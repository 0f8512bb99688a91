package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/txbox/txbox/internal/servers"
	"github.com/txbox/txbox/internal/servers/serverstest"
)

// clone makes an empty folder the repository of this test.
func clone(t *testing.T) string {
	t.Helper()
	root := serverstest.Folder(t)
	must(t, os.Mkdir(filepath.Join(root, "deploy"), 0o755))
	must(t, os.WriteFile(filepath.Join(root, "deploy", "compose.yaml"), nil, 0o600))
	t.Chdir(root)
	t.Setenv("DATABASE_URL", "")
	t.Setenv("AMQP_URL", "")
	t.Cleanup(func() { must(t, run(context.Background(), down)) })
	return root
}

func TestUpIsSafeToRepeatAndDownLeavesNothing(t *testing.T) {
	root := clone(t)
	var both sync.WaitGroup
	for range 2 {
		both.Go(func() {
			if err := run(t.Context(), up); err != nil {
				t.Error(err)
			}
		})
	}
	both.Wait()
	first := sourced(t, root)
	must(t, run(t.Context(), status))
	for _, b := range newEnvironment(root).backends {
		if !strings.Contains(first, b.private.URL()) {
			t.Errorf("%s is not in .dev/env: %s", b.private.URL(), first)
		}
		must(t, b.private.(interface{ Kill() error }).Kill())
	}
	if run(t.Context(), status) == nil {
		t.Error("status has not noticed a crash")
	}

	setFrom(t, first) // as in a shell that has sourced .dev/env
	must(t, run(t.Context(), up))
	if again := sourced(t, root); again != first {
		t.Errorf("after a crash .dev/env says %s, before %s", again, first)
	}
	must(t, run(t.Context(), down))
	if _, err := os.Stat(filepath.Join(root, ".dev", "env")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf(".dev/env: %v", err)
	}
	left, err := exec.Command("sh", "-c", "ls -l /proc/[0-9]*/cwd 2>/dev/null | grep -F "+root+"/.dev").Output()
	if err == nil {
		t.Errorf("processes live on:\n%s", left)
	}
	must(t, run(t.Context(), down))
}

func TestUpUsesAServerOfTheUserAndStartsNone(t *testing.T) {
	root := clone(t)
	database := serverstest.Postgres(t)
	t.Setenv("DATABASE_URL", database.URL()+"&application_name=it's")
	env := newEnvironment(root)
	env.backends = env.backends[:1]
	must(t, os.MkdirAll(env.dir, 0o755))
	must(t, up(t.Context(), env))
	if got, want := sourced(t, root), database.URL()+"&application_name=it's\n\n"; got != want {
		t.Errorf(".dev/env gives %q, want %q", got, want)
	}
	if (&servers.Postgres{Dir: filepath.Join(root, ".dev", "postgresql")}).Ready(t.Context()) == nil {
		t.Error("a private server runs")
	}
}

func TestUpNamesTheVariableAndNoPasswordIfTheUsersServerIsAway(t *testing.T) {
	for variable, urls := range map[string][]string{
		"DATABASE_URL": {"postgres://me:S3cret@127.0.0.1:1/db", "postgres://me:S3cret%zz@127.0.0.1/db", "host=127.0.0.1 port=1 password=S3cret"},
		"AMQP_URL":     {"amqp://me:S3cret@127.0.0.1:1/", "amqp://me:S3cret%zz@127.0.0.1/", "amqp://me:S3cret@127.0.0.1:1/,amqp://me:S3cret@127.0.0.1:2/"},
	} {
		for _, url := range urls {
			t.Run(variable, func(t *testing.T) {
				t.Setenv("DATABASE_URL", "postgres://127.0.0.1:1/")
				t.Setenv("AMQP_URL", "amqp://127.0.0.1:1/")
				t.Setenv(variable, url)
				err := newEnvironment(t.TempDir()).each(func(b *backend) error { return b.up(t.Context()) })
				if text := fmt.Sprint(err); !strings.Contains(text, variable) || strings.Contains(text, "S3cret") {
					t.Error(text)
				}
			})
		}
	}
}

// sourced returns both URLs as a shell gets them.
func sourced(t *testing.T, root string) string {
	t.Helper()
	shell := exec.Command("sh", "-c", `DATABASE_URL= AMQP_URL=; . .dev/env; echo "$DATABASE_URL"; echo "$AMQP_URL"`)
	shell.Dir = root
	output, err := shell.Output()
	must(t, err)
	return string(output)
}

func setFrom(t *testing.T, sourced string) {
	t.Helper()
	lines := strings.Split(sourced, "\n")
	t.Setenv("DATABASE_URL", lines[0])
	t.Setenv("AMQP_URL", lines[1])
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
