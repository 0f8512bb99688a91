package relay

import (
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
	destinations map[destination]time.Time // when they last refused something
	deadAt       time.Time                 // when dead messages were mentioned last
	unsaid       int                       // dead messages since
}

// maxRefusals bounds the destinations that are remembered, and so the lines.
const maxRefusals = 1000

func (f *refusals) refused(m *message, reason, text string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	d := m.destination
	_, known := f.destinations[d]
	if !known && len(f.destinations) >= maxRefusals {
		return
	}
	if f.destinations[d] = time.Now(); known {
		return
	}
	f.count.Store(int64(len(f.destinations)))
	f.log.Warn("relay: messages are refused; they are parked", "exchange", m.exchange, "routing_key", m.routingKey,
		"reason", reason, "error", text)
}

// acceptedAfter is how long a destination must not have refused anything before it
// counts as one that accepts: a full queue does both in turn.
const acceptedAfter = 5 * time.Second

func (f *refusals) accepted(m *message) {
	if f.count.Load() == 0 {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	d := m.destination
	if last, ok := f.destinations[d]; ok && time.Since(last) > acceptedAfter {
		delete(f.destinations, d)
		f.count.Store(int64(len(f.destinations)))
		f.log.Info("relay: messages are accepted again", "exchange", m.exchange, "routing_key", m.routingKey)
	}
}

// deadEvery bounds the lines about dead messages.
const deadEvery = 10 * time.Second

// dead says that a message waits for a human.
func (f *refusals) dead(v verdict) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if time.Since(f.deadAt) < deadEvery {
		f.unsaid++
		return
	}
	f.log.Error("relay: a message is dead; it waits for a human in outbox_parked", "id", v.id, "message_id", v.messageID,
		"exchange", v.exchange, "routing_key", v.routingKey, "error", v.lastError, "more", f.unsaid)
	f.deadAt, f.unsaid = time.Now(), 0
}
