package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// The diff in docs that turns the naive consumer into one with an inbox applies, compiles,
// and changes five lines at most.
func TestNaiveConsumerBecomesExactInFiveLines(t *testing.T) {
	t.Parallel()
	diff, err := os.ReadFile("../../docs/naive-to-inbox.diff")
	if err != nil {
		t.Fatal(err)
	}
	changed := 0
	for line := range strings.Lines(string(diff)) {
		if (line[0] == '+' || line[0] == '-') && !strings.HasPrefix(line, "+++") && !strings.HasPrefix(line, "---") {
			changed++
		}
	}
	if changed == 0 || changed > 5 {
		t.Errorf("%d lines are changed", changed)
	}
	dir := t.TempDir()
	naive, err := os.ReadFile("naive.go")
	if err != nil {
		t.Fatal(err)
	}
	exact := filepath.Join(dir, "examples", "payments", "naive.go")
	if err := os.MkdirAll(filepath.Dir(exact), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(exact, naive, 0o644); err != nil {
		t.Fatal(err)
	}
	run := func(dir, stdin string, args ...string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
		cmd.Dir, cmd.Stdin = dir, strings.NewReader(stdin)
		if output, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %s\n%s", args, err, output)
		}
	}
	run(dir, string(diff), "git", "apply", "-p1", "-")
	original, err := filepath.Abs("naive.go")
	if err != nil {
		t.Fatal(err)
	}
	overlay := filepath.Join(dir, "overlay.json")
	text := `{"Replace": {` + strconv.Quote(original) + `: ` + strconv.Quote(exact) + `}}`
	if err := os.WriteFile(overlay, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	run(".", "", "go", "build", "-overlay", overlay, "-o", filepath.Join(dir, "payments"), ".")
}
