package relay

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

// refusals logs which destinations refuse messages: a line when one begins to, and
// one when it takes them again; and that messages are dead.
type refusals struct {
	log   *slog.Logger
	count atomic.Int64 // of destinations, so that what is confirmed need not lock

	mu           sync.Mutex
	destinations map[destination]*refusal
	died, apart  lines // about dead messages, and about those that have no answer
}

// lines bounds how many are written about single messages.
type lines struct {
	since        time.Time // since when said counts
	said, unsaid int
}

// allow says whether a line may be written, and after how many that were not.
func (l *lines) allow() (unsaid int, ok bool) {
	if time.Since(l.since) > linesEvery {
		l.since, l.said = time.Now(), 0
	}
	if l.said++; l.said > maxLines {
		l.unsaid++
		return 0, false
	}
	unsaid, l.unsaid = l.unsaid, 0
	return unsaid, true
}

// refusal is when a destination last refused a message, and when it accepted one.
type refusal struct{ refused, accepted time.Time }

const (
	// maxRefusals bounds the destinations that are remembered.
	maxRefusals = 1000
	// acceptedAfter is how long a destination must not have refused anything before it
	// counts as one that accepts: a full queue does both in turn.
	acceptedAfter = 5 * time.Second
	// So many lines about single messages are written within that time.
	maxLines   = 20
	linesEvery = 10 * time.Second
)

func (f *refusals) refused(m *message, reason, text string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if known := f.destinations[m.destination]; known != nil {
		known.refused = time.Now()
		return
	}
	for old := range f.destinations { // any: it is said again if it refuses again
		if len(f.destinations) < maxRefusals {
			break
		}
		delete(f.destinations, old)
	}
	f.destinations[m.destination] = &refusal{refused: time.Now()}
	f.count.Store(int64(len(f.destinations)))
	f.log.Warn("relay: messages are refused; they are parked", "exchange", m.exchange, "routing_key", m.routingKey,
		"reason", reason, "error", text)
}

func (f *refusals) accepted(m *message) {
	if f.count.Load() == 0 {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if known := f.destinations[m.destination]; known != nil {
		known.accepted = time.Now()
	}
}

// watch says which destinations accept messages again, until ctx ends.
func (f *refusals) watch(ctx context.Context) {
	for pause(ctx, time.Second) == nil {
		f.mu.Lock()
		for d, known := range f.destinations {
			if known.accepted.After(known.refused) && time.Since(known.refused) > acceptedAfter {
				delete(f.destinations, d)
				f.log.Info("relay: messages are accepted again", "exchange", d.exchange, "routing_key", d.routingKey)
			}
		}
		f.count.Store(int64(len(f.destinations)))
		f.mu.Unlock()
	}
}

// dead says that a message waits for a human.
func (f *refusals) dead(v verdict) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if unsaid, ok := f.died.allow(); ok {
		f.log.Error("relay: a message is dead; it waits for a human in outbox_parked", "id", v.id, "message_id", v.messageID,
			"key", v.key, "exchange", v.exchange, "routing_key", v.routingKey, "error", v.lastError, "without_a_line", unsaid)
	}
}

// unanswered says that a message has no answer, though it was published apart.
func (f *refusals) unanswered(m *message) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if unsaid, ok := f.apart.allow(); ok {
		f.log.Warn("relay: a message has no answer; it is parked, and tried alone", "message_id", m.messageID,
			"key", m.key, "exchange", m.exchange, "routing_key", m.routingKey, "without_a_line", unsaid)
	}
}
