package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/txbox/txbox/internal/testenv"
	"github.com/txbox/txbox/outbox"
)

// A hundred messages of 8 MiB, the largest that package outbox writes by default, go
// through a relay that never needs more than 256 MiB.
func TestLargeMessagesFitInto256MiB(t *testing.T) {
	plain := filepath.Join(t.TempDir(), "relay") // the race detector needs several times as much
	if out, err := exec.Command("go", "build", "-o", plain, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	db := testenv.Schema(t)
	name, messages := queue(t, testenv.AMQPURL(t))
	const n = 100
	payload := make([]byte, 8<<20)
	for range n / 10 {
		batch := make([]outbox.Message, 10)
		for i := range batch {
			batch[i] = outbox.Message{RoutingKey: name, Payload: payload}
		}
		must(t, pgx.BeginFunc(testenv.Context(t), db, func(tx pgx.Tx) error {
			return outbox.Writer{Schema: db.Schema}.Write(testenv.Context(t), tx, batch...)
		}))
	}
	relay := startProgram(t, plain, []string{"DATABASE_URL=" + db.URL, "TXBOX_SCHEMA=" + db.Schema, "AMQP_URL=" + testenv.AMQPURL(t)}, "run")
	testenv.Eventually(t, 90*time.Second, "all are published", func() bool { return messages() == n })
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", relay.Process.Pid))
	must(t, err)
	_, after, _ := strings.Cut(string(status), "VmHWM:")
	var peak int
	_, err = fmt.Sscanf(after, "%d kB", &peak)
	must(t, err)
	t.Logf("peak: %d MiB", peak>>10)
	if peak > 256<<10 {
		t.Errorf("%d MiB at its peak", peak>>10)
	}
}
