package relay_test

import (
	"bytes"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

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

// logTo lets a relay log there, too.
func (b *bundle) logTo(log *lockedBuffer) func(*relay.Config, *relay.RabbitMQConfig) {
	return func(cfg *relay.Config, _ *relay.RabbitMQConfig) {
		cfg.Logger = slog.New(slog.NewTextHandler(io.MultiWriter(log, b.Output()), nil))
	}
}

func TestLogTellsOnceWhichDestinationRefusesAndWhenItAcceptsAgain(t *testing.T) {
	t.Parallel()
	b := setup(t)
	queue, declare := b.absent()
	b.write(to(queue, b.messages(50, noKey))...)
	log := &lockedBuffer{}
	b.start(brisk, b.logTo(log))
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

// A full queue refuses and accepts in turn, many times a second.
func TestLogOfAQueueThatIsFullIsShort(t *testing.T) {
	t.Parallel()
	b := setup(t)
	full := testenv.Name(t)
	_, err := b.ch.QueueDeclare(full, true, false, false, false, amqp.Table{"x-max-length": 3, "x-overflow": "reject-publish"})
	b.must(err)
	t.Cleanup(func() { b.ch.QueueDelete(full, false, false, false) })
	log := &lockedBuffer{}
	r, _ := b.start(b.logTo(log))
	for range 30 {
		b.write(to(full, b.messages(20, noKey))...)
		b.must(pauseFor(t, 100*time.Millisecond))
		_, err := b.ch.QueuePurge(full, false)
		b.must(err)
	}
	if s := r.Stats(); s.Published < 10 || s.Refused < 10 {
		t.Errorf("%+v: this test shows nothing", s)
	}
	if n := log.lines("refused") + log.lines("accepted"); n > 2 {
		t.Errorf("%d lines", n)
	}
}
