package relay

import (
	"log/slog"
	"sync"
	"sync/atomic"
)

// refusals logs which destinations refuse messages: a line when one begins to, and
// one when it takes them again.
type refusals struct {
	log   *slog.Logger
	count atomic.Int64 // of destinations, so that what is confirmed need not lock

	mu           sync.Mutex
	destinations map[destination]bool
}

// maxRefusals bounds the destinations that are remembered, and so the lines.
const maxRefusals = 1000

func (f *refusals) refused(m *message, reason, text string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	d := m.destination
	if f.destinations[d] || len(f.destinations) >= maxRefusals {
		return
	}
	f.destinations[d] = true
	f.count.Store(int64(len(f.destinations)))
	f.log.Warn("messages are refused; they are parked", "exchange", m.exchange, "routing_key", m.routingKey,
		"reason", reason, "error", text)
}

func (f *refusals) accepted(m *message) {
	if f.count.Load() == 0 {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	d := m.destination
	if f.destinations[d] {
		delete(f.destinations, d)
		f.count.Store(int64(len(f.destinations)))
		f.log.Info("messages are accepted again", "exchange", m.exchange, "routing_key", m.routingKey)
	}
}
