package layers

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

func TestWrongTransactionTypesDoNotCompile(t *testing.T) {
	const file = "testdata/misuse/misuse.go"
	source, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("go", "build", "-gcflags=-e", "./testdata/misuse").CombinedOutput()
	if err == nil {
		t.Fatal("all of it compiles")
	}
	refusals := 0
	number := 0
	for line := range strings.Lines(string(source)) {
		number++
		refused := strings.Contains(string(out), fmt.Sprintf("%s:%d:", file, number))
		if want := strings.Contains(line, "// refused"); refused != want {
			t.Errorf("line %d, refused %v: %s", number, refused, line)
		}
		if refused {
			refusals++
		}
	}
	if refusals < 12 {
		t.Errorf("%d refusals\n%s", refusals, out)
	}
}
