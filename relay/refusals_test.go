package relay_test

import (
	"bytes"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/txbox/txbox/internal/testenv"
	"github.com/txbox/txbox/relay"
)

// lockedBuffer is where a log is written while the test reads it.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

// lines returns how many lines hold text.
func (b *lockedBuffer) lines(text string) (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for line := range strings.Lines(b.buf.String()) {
		if strings.Contains(line, text) {
			n++
		}
	}
	return n
}

func TestLogTellsOnceWhichDestinationRefusesAndWhenItAcceptsAgain(t *testing.T) {
	t.Parallel()
	b := setup(t)
	queue, declare := b.absent()
	b.write(to(queue, b.messages(50, noKey))...)
	log := &lockedBuffer{}
	b.start(brisk, func(cfg *relay.Config, _ *relay.RabbitMQConfig) { cfg.Logger = slog.New(slog.NewTextHandler(log, nil)) })
	b.eventuallyCount("outbox_parked", 50)
	if n := log.lines("messages are refused"); n != 1 || log.lines("routing_key="+queue) != 1 || log.lines("NO_ROUTE") != 1 {
		t.Errorf("%d lines", n)
	}
	declare()
	b.drain(queue, 50)
	testenv.Eventually(t, 20*time.Second, "the log says so", func() bool { return log.lines("messages are accepted again") >= 1 })
	if n := log.lines("messages are refused") + log.lines("messages are accepted again"); n != 2 {
		t.Errorf("%d lines", n)
	}
}
