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
	deadSince    time.Time // since when said counts
	said, unsaid int       // dead messages, with a line and without
}

// refusal is when a destination last refused a message, and when it accepted one.
type refusal struct{ refused, accepted time.Time }

const (
	// maxRefusals bounds the destinations that are remembered.
	maxRefusals = 1000
	// acceptedAfter is how long a destination must not have refused anything before it
	// counts as one that accepts: a full queue does both in turn.
	acceptedAfter = 5 * time.Second
	// So many lines about dead messages are written within that time.
	deadLines = 20
	deadEvery = 10 * time.Second
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
	if time.Since(f.deadSince) > deadEvery {
		f.deadSince, f.said = time.Now(), 0
	}
	if f.said++; f.said > deadLines {
		f.unsaid++
		return
	}
	f.log.Error("relay: a message is dead; it waits for a human in outbox_parked", "id", v.id, "message_id", v.messageID,
		"key", v.key, "exchange", v.exchange, "routing_key", v.routingKey, "error", v.lastError, "without_a_line", f.unsaid)
	f.unsaid = 0
}
