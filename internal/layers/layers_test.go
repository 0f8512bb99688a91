// Package layers holds the rules of who may import whom; "make lint" runs it.
package layers

import (
	"os/exec"
	"strings"
	"testing"
)

const (
	module = "github.com/txbox/txbox/"
	amqp   = "github.com/rabbitmq/amqp091-go"
	migr   = "github.com/golang-migrate/migrate/v4"
)

// forbidden lists, for each package, what it must not link, directly or through
// others. Siblings do not know each other, except that the relay knows messages;
// a producer links neither the broker's client nor the migrations.
var forbidden = map[string][]string{
	"migrations": {module + "outbox", module + "inbox", module + "relay", amqp},
	"outbox":     {module + "migrations", module + "inbox", module + "relay", amqp, migr},
	"inbox":      {module + "migrations", module + "outbox", module + "relay", migr},
	"relay":      {module + "migrations", module + "inbox", migr},
}

func TestPackagesLinkOnlyWhatTheirLayerAllows(t *testing.T) {
	for name, rules := range forbidden {
		out, err := exec.Command("go", "list", "-deps", module+name).Output()
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for dep := range strings.Lines(string(out)) {
			dep = strings.TrimSpace(dep)
			for _, rule := range rules {
				if dep == rule || strings.HasPrefix(dep, rule+"/") {
					t.Errorf("%s links %s", name, dep)
				}
			}
		}
	}
}

func TestOnlyCommandsAndExamplesLinkCommandLineParsing(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", `{{.ImportPath}} {{join .Deps " "}}`, module+"...").Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		name, deps, _ := strings.Cut(line, " ")
		name = strings.TrimPrefix(name, module)
		if strings.HasPrefix(name, "cmd/") || strings.HasPrefix(name, "examples/") {
			continue
		}
		if strings.Contains(deps, "github.com/alecthomas/kong") {
			t.Errorf("%s links kong", name)
		}
	}
}
