// Command saboteurs shows that the checker can fail: it builds package chaos once for each
// mistake in list.go, runs a short storm, and says what caught it. Nothing of the mistakes
// stands in the product: they are edits that "go build -overlay" sees in place of our files.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	only := flag.String("only", "", "those whose names hold this `text`")
	dir := flag.String("dir", ".dev/saboteurs", "`folder` for programs and servers")
	seed := flag.Uint64("seed", 1, "of each storm")
	flag.Parse()
	if err := run(ctx, *dir, *only, *seed); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

// run prints a table as it stands in docs/reliability.md.
func run(ctx context.Context, dir, only string, seed uint64) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	fmt.Println("| a relay or an inbox that ... | is caught by | after |")
	fmt.Println("|---|---|---|")
	var free []string
	for _, s := range saboteurs {
		if !strings.Contains(s.name, only) {
			continue
		}
		began := time.Now()
		caught, err := s.storm(ctx, dir, seed)
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		if caught == "" {
			free, caught = append(free, s.name), "nothing"
		}
		fmt.Printf("| %s | %s | %.0f s |\n", s.name, caught, time.Since(began).Seconds())
	}
	if len(free) > 0 {
		return fmt.Errorf("%d are not caught: %s", len(free), strings.Join(free, "; "))
	}
	return nil
}

// storm returns the invariants that were broken.
func (s saboteur) storm(ctx context.Context, dir string, seed uint64) (caught string, err error) {
	program, err := s.build(ctx, dir)
	if err != nil {
		return "", err
	}
	args := []string{"run", "-dir=" + filepath.Join(dir, "run"), "-faults=" + s.faults, fmt.Sprint("-seed=", seed),
		"-duration=30s", "-rate=200", "-drain-limit=15s"}
	if s.hold != "" {
		args = append(args, "-hold="+s.hold)
	}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	output, err := cmd.CombinedOutput()
	lines := bytes.Split(bytes.TrimSpace(output), []byte("\n"))
	var verdict struct {
		OK         bool
		Violations []string
	}
	if bad := json.Unmarshal(lines[len(lines)-1], &verdict); bad != nil {
		return "", fmt.Errorf("%w: no verdict: %s", errors.Join(err, ctx.Err()), output)
	}
	return strings.Join(verdict.Violations, "; "), nil
}

// build compiles the storm with the mistake in it.
func (s saboteur) build(ctx context.Context, dir string) (program string, err error) {
	overlay, err := s.overlay(dir)
	if err != nil {
		return "", err
	}
	program = filepath.Join(dir, "chaos")
	output, err := exec.CommandContext(ctx, "go", "build", "-tags=failpoint", "-overlay="+overlay, "-o", program, "./internal/chaos").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, output)
	}
	return program, nil
}

// overlay writes the edited files, and the list of them that go build takes.
func (s saboteur) overlay(dir string) (path string, err error) {
	edited, err := s.edited("")
	if err != nil {
		return "", err
	}
	var list struct{ Replace map[string]string }
	list.Replace = make(map[string]string)
	for file, text := range edited {
		replacement := filepath.Join(dir, strings.ReplaceAll(file, "/", "_"))
		if err := os.WriteFile(replacement, []byte(text), 0o644); err != nil {
			return "", err
		}
		list.Replace[file] = replacement
	}
	text, err := json.Marshal(list)
	if err != nil {
		return "", err
	}
	path = filepath.Join(dir, "overlay.json")
	return path, os.WriteFile(path, text, 0o644)
}

// edited returns the files with the edits in them, by name below root.
func (s saboteur) edited(root string) (map[string]string, error) {
	files := make(map[string]string)
	for _, e := range s.edits {
		if files[e.file] == "" {
			text, err := os.ReadFile(filepath.Join(root, e.file))
			if err != nil {
				return nil, err
			}
			files[e.file] = string(text)
		}
		if n := strings.Count(files[e.file], e.old); n != 1 {
			return nil, fmt.Errorf("%s: %q stands %d times in %s", s.name, e.old, n, e.file)
		}
		files[e.file] = strings.Replace(files[e.file], e.old, e.new, 1)
	}
	return files, nil
}
