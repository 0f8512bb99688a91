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
	reason    string // retry, dead or blocked
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
	lines     map[string]*line // by key, of those with messages in the hand or in outbox_parked
	bytes     int              // of payloads
	held      [lanes]int       // messages not settled
	busy      [lanes]int       // of those, messages taken
	confirmed []*message
	refused   []verdict
	gone      []int64 // settled since the last read ended

	ready  chan *message // any order but that within a key
	probes chan *message // to be published one at a time, on a channel of their own
	settle chan struct{} // there is something to settle
	space  chan struct{} // something was settled
}

// line is what the hand knows of a key. Of an open one, one message at a time is
// published and the others wait. A blocked one has a message in outbox_parked, its
// head, or on the way there: what follows is parked behind it, and only the head
// is published.
type line struct {
	lane    int16
	waiting []*message
	busy    bool // one is ready or in flight
	held    int  // messages in the hand, not settled
	blocked bool
	changed bool // it may have a new head, or none
}

const (
	handRows  = 5000     // messages in the hand at most, a page more while it is read
	handBytes = 64 << 20 // of their payloads, likewise
	pageRows  = 1000
	pageBytes = 16 << 20
)

func newHand() *hand {
	return &hand{
		byID:  make(map[int64]*message),
		lines: make(map[string]*line),
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
			continue
		}
		l := h.line(m.key, m.lane)
		l.held++
		l.blocked = l.blocked || m.parked
		switch {
		case l.blocked && !m.parked:
			h.block(m)
		case l.busy:
			l.waiting = append(l.waiting, m)
		default:
			l.busy = true
			h.ready <- m
		}
	}
	return added
}

func (h *hand) line(key string, lane int16) *line {
	l := h.lines[key]
	if l == nil {
		l = &line{lane: lane}
		h.lines[key] = l
	}
	return l
}

// block parks a message behind the head of its key.
func (h *hand) block(m *message) {
	h.busy[m.lane]++
	h.refused = append(h.refused, verdict{message: m, reason: "blocked"})
	notify(h.settle)
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
	h.forget(m)
	h.next(m)
}

func (h *hand) forget(m *message) {
	delete(h.byID, m.id)
	h.left(m)
}

// left counts a message that has been settled, or forgotten.
func (h *hand) left(m *message) {
	h.held[m.lane]--
	h.bytes -= len(m.payload)
	if l := h.lines[m.key]; l != nil {
		if l.held--; l.held == 0 {
			if l.changed = l.blocked; !l.blocked {
				delete(h.lines, m.key)
			}
		}
	}
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

// refuse records that the broker will not have a message now. It blocks its key.
func (h *hand) refuse(v verdict) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.refused = append(h.refused, v)
	if l := h.lines[v.key]; l != nil {
		l.blocked, l.busy = true, false
		for _, m := range l.waiting {
			if m.parked {
				h.forget(m) // it is behind the head already
			} else {
				h.block(m)
			}
		}
		l.waiting = nil
	}
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
	l := h.lines[m.key]
	if l == nil {
		return
	}
	if l.busy = len(l.waiting) > 0; l.busy {
		h.ready <- l.waiting[0]
		l.waiting = l.waiting[1:]
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
	h.busy[m.lane]--
	h.left(m)
	m.payload = nil
	h.gone = append(h.gone, m.id)
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
