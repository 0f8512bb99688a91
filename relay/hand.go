package relay

import (
	"sync"
	"time"

	"github.com/google/uuid"
)

const lanes = 64

// message is one message in the relay's hand.
type message struct {
	id          int64
	lane        int16
	epoch       int64 // of the lane when the message was read
	messageID   uuid.UUID
	key         string
	exchange    string
	routingKey  string
	typ         string
	contentType string
	headers     map[string]string
	payload     []byte
	createdAt   time.Time
	parked      bool // published from outbox_parked
	attempts    int
	alone       bool // to be published with nothing else in flight on its channel
}

// verdict is what became of a message that the broker did not accept.
type verdict struct {
	*message
	reason    string // retry or dead
	spend     int    // attempts spent by it
	delay     time.Duration
	lastError string
}

// hand holds every message between the moment at which it was read and the moment
// at which its row is gone and no read that could have seen the row is under way.
// While a message is in it, reading its row again changes nothing. It does no
// I/O and calls nobody; doc.go draws the states.
type hand struct {
	mu        sync.Mutex
	byID      map[int64]*message
	waiting   map[string][]*message // by key, behind the one message of the key in ready or in flight
	bytes     int                   // of payloads
	held      [lanes]int            // messages not settled
	busy      [lanes]int            // of those, messages taken
	confirmed []*message
	refused   []verdict
	gone      []int64 // settled since the last read ended

	ready  chan *message // any order but that within a key
	probes chan *message // to be published one at a time, on a channel of their own
	settle chan struct{} // there is something to settle
	space  chan struct{} // something was settled
}

const (
	handRows  = 5000     // messages in the hand at most, a page more while it is read
	handBytes = 64 << 20 // of their payloads, likewise
	pageRows  = 1000
	pageBytes = 16 << 20
)

func newHand() *hand {
	return &hand{
		byID:    make(map[int64]*message),
		waiting: make(map[string][]*message),
		// Each message is in one of them at most once: sending never blocks.
		ready:  make(chan *message, handRows+pageRows+lanes*pageRows),
		probes: make(chan *message, handRows+pageRows+lanes*pageRows),
		settle: make(chan struct{}, 1),
		space:  make(chan struct{}, 1),
	}
}

// full says that the reader must wait for space.
func (h *hand) full() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.byID) >= handRows || h.bytes >= handBytes
}

// admit adds what a read has found and returns how many messages were new.
func (h *hand) admit(page []*message) (added int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range page {
		if h.byID[m.id] != nil {
			continue
		}
		h.byID[m.id] = m
		h.held[m.lane]++
		h.bytes += len(m.payload)
		added++
		if m.key == "" {
			h.ready <- m
		} else if queue, busy := h.waiting[m.key]; busy {
			h.waiting[m.key] = append(queue, m)
		} else {
			h.waiting[m.key] = nil
			h.ready <- m
		}
	}
	return added
}

// readEnded forgets the messages that were settled before the next read begins:
// no read that is still under way can have seen their rows.
func (h *hand) readEnded() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, id := range h.gone {
		delete(h.byID, id)
	}
	h.gone = h.gone[:0]
}

// take marks a message of ready or probes as under way.
func (h *hand) take(m *message) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.busy[m.lane]++
}

// drop forgets a message that was not taken, whose lane is no longer ours.
func (h *hand) drop(m *message) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.byID, m.id)
	h.held[m.lane]--
	h.bytes -= len(m.payload)
	h.next(m)
	notify(h.space)
}

// confirm records that the broker has accepted a message: its row may go, and
// the next of its key may come.
func (h *hand) confirm(m *message) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.confirmed = append(h.confirmed, m)
	h.next(m)
	notify(h.settle)
}

// refuse records that the broker will not have a message now.
func (h *hand) refuse(v verdict) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.refused = append(h.refused, v)
	h.next(v.message)
	notify(h.settle)
}

// retry takes back a message whose fate is unknown: it is published again.
func (h *hand) retry(m *message) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.busy[m.lane]--
	if m.alone {
		h.probes <- m
	} else {
		h.ready <- m
	}
}

// next lets the message behind m follow.
func (h *hand) next(m *message) {
	if m.key == "" {
		return
	}
	if queue := h.waiting[m.key]; len(queue) > 0 {
		h.waiting[m.key] = queue[1:]
		h.ready <- queue[0]
	} else {
		delete(h.waiting, m.key)
	}
}

// toSettle hands over at most max confirmed and max refused messages.
func (h *hand) toSettle(max int) (confirmed []*message, refused []verdict) {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := min(max, len(h.confirmed))
	confirmed, h.confirmed = h.confirmed[:n:n], h.confirmed[n:]
	n = min(max, len(h.refused))
	refused, h.refused = h.refused[:n:n], h.refused[n:]
	return confirmed, refused
}

// settled records that the statement which removes or parks a message returned.
func (h *hand) settled(m *message) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.held[m.lane]--
	h.busy[m.lane]--
	h.bytes -= len(m.payload)
	m.payload = nil
	h.gone = append(h.gone, m.id)
	notify(h.space)
}

// idle says that nothing of a lane is under way.
func (h *hand) idle(lane int) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.busy[lane] == 0
}

// empty says that nothing of a lane is in the hand.
func (h *hand) empty(lane int) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.held[lane] == 0
}

// parkedIDs returns the ids of all messages in the hand that were parked.
func (h *hand) parkedIDs() []int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	ids := []int64{}
	for id, m := range h.byID {
		if m.parked {
			ids = append(ids, id)
		}
	}
	return ids
}

// notify makes a channel of capacity one readable, if it is not.
func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
