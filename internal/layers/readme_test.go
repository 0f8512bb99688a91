package layers

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// What README shows as Go is compiled: each block stands word for word in an
// example of its package.
func TestReadmeShowsCompiledExamples(t *testing.T) {
	var examples string
	for _, file := range []string{"../../outbox/example_test.go", "../../inbox/example_test.go", "../../relay/example_test.go"} {
		examples += unindented(read(t, file))
	}
	blocks := regexp.MustCompile("(?s)```go\n(.*?)```").FindAllStringSubmatch(read(t, "../../README.md"), -1)
	if len(blocks) < 2 {
		t.Fatalf("README has %d blocks of Go", len(blocks))
	}
	for _, block := range blocks {
		if !strings.Contains(examples, unindented(block[1])) {
			t.Errorf("this is in no example:\n%s", block[1])
		}
	}
}

func read(t *testing.T, file string) string {
	t.Helper()
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

func unindented(text string) string {
	return regexp.MustCompile(`(?m)^\s+`).ReplaceAllString(text, "")
}
