package relay

import (
	"math/rand/v2"
	"sync"
	"time"
)

const lanes = 64

// hand holds every message between the moment at which it was read and the moment
// at which its row is gone and no read that could have seen the row is under way.
// While a message is in it, reading its row again changes nothing. It does no
// I/O and calls nobody; doc.go draws the states.
type hand struct {
	mu        sync.Mutex
	byID      map[int64]*message
	lines     map[string]*line // by key
	passed    map[*line]bool   // those with messages that were passed over
	routes    map[destination]*route
	onTrial   map[destination]bool // they have yet to show that they answer
	turn      []*route             // those of which something may be taken, the next first
	bytes     int                  // of payloads
	waiting   int                  // messages that wait in lines
	waitBytes int                  // of their payloads
	inFlight  int
	refusing  int        // verdicts not settled
	unsettled [lanes]int // messages whose rows are as they were read
	taken     [lanes]int // of those, in flight or with a verdict
	trials    queue      // of what is on trial, or may have closed a channel
	probes    queue      // of the probes of suspects
	confirmed []*message
	refused   []verdict
	gone      []int64      // settled since the last read ended
	changed   []blockedKey // keys of which the parked messages have changed

	some   chan struct{} // something may be taken
	settle chan struct{} // there is something to settle
	space  chan struct{} // something was settled
}

const (
	// No more is read while so many messages are in the hand, or bytes of payloads;
	// while it starves, twice as many. What is read at once comes on top.
	handRows  = 5000
	handBytes = 32 << 20
	pageRows  = 2000
	pageBytes = 8 << 20
	slowDelay = 5 * time.Second // at most, for what would crowd the hand
	// freePlaces in the window say that the broker could take more.
	freePlaces = 4
)

func newHand() *hand {
	return &hand{
		byID:    make(map[int64]*message),
		lines:   make(map[string]*line),
		passed:  make(map[*line]bool),
		routes:  make(map[destination]*route),
		onTrial: make(map[destination]bool),
		some:    make(chan struct{}, 1),
		trials:  queue{some: make(chan struct{}, 1)},
		probes:  queue{some: make(chan struct{}, 1)},
		settle:  make(chan struct{}, 1),
		space:   make(chan struct{}, 1),
	}
}

// full says that the reader must wait for space.
func (h *hand) full() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.isFull(2) || h.isFull(1) && !h.starving()
}

func (h *hand) isFull(times int) bool {
	return len(h.byID) >= times*handRows || h.bytes >= times*handBytes
}

// starving says that the hand is full of messages that wait for others of their key or
// for a slow destination, while the broker could take more: the reader then goes on
// and leaves in the tables what would have to wait too.
func (h *hand) starving() bool {
	if !h.isFull(1) || len(h.turn) > 0 || h.inFlight > channels*window-freePlaces {
		return false
	}
	rows, bytes := h.waiting, h.waitBytes
	for _, r := range h.routes {
		if h.isSlow(r) {
			rows, bytes = rows+len(r.ready), bytes+r.bytes
		}
	}
	return rows >= handRows/2 || bytes >= handBytes/2
}

// admit adds what a read has found and returns how many messages were new.
func (h *hand) admit(page []*message) (added int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.admitAll(page)
}

func (h *hand) admitAll(page []*message) (added int) {
	starving := h.starving()
	for _, m := range page {
		if h.byID[m.id] != nil {
			continue
		}
		var l *line
		if m.key != "" {
			if l = h.line(m); !m.parked && l.passes(m, starving) {
				h.passed[l] = true
				continue
			}
			if l.unsettled == 0 {
				l.blocked = l.blocked || m.behind
			}
			l.headParked = l.headParked && !m.parked
			l.unsettled++
		}
		h.byID[m.id] = m
		h.unsettled[m.lane]++
		h.bytes += len(m.payload)
		added++
		switch {
		case l != nil && l.blocked && !m.parked:
			h.block(m)
		case l != nil && l.busy:
			h.wait(l, m)
		case starving && h.isSlow(h.routes[m.destination]):
			if l != nil {
				l.busy = true
			}
			h.taken[m.lane]++
			h.refuseOne(verdict{message: m, reason: "retry", delay: rand.N(slowDelay), lastError: "its destination confirms slowly"})
			notify(h.settle)
		default:
			if l != nil {
				l.busy = true
			}
			h.push(m)
		}
	}
	return added
}

// readEnded forgets the messages that were settled, and the blocked keys of which
// nothing is in the hand, before the next read begins: no read that is still under
// way can have seen the rows as they were.
func (h *hand) readEnded() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, id := range h.gone {
		if m := h.byID[id]; m.key != "" {
			if l := h.lines[m.key]; l != nil && l.unsettled == 0 {
				l.blocked = false // the table says so from now on
				h.emptied(l)
			}
		}
		delete(h.byID, id)
	}
	h.gone = h.gone[:0]
}

// drop forgets a message that was taken and not sent, whose lane is no longer ours.
func (h *hand) drop(m *message) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.taken[m.lane]--
	h.freePlace(m)
	h.endTrial(m)
	h.next(m)
	h.forget(m)
}

func (h *hand) forget(m *message) {
	delete(h.byID, m.id)
	h.unsettled[m.lane]--
	h.uncount(m)
}

// uncount counts a message that has been settled, forgotten or put aside out of its line.
func (h *hand) uncount(m *message) {
	h.bytes -= len(m.payload)
	if l := h.lines[m.key]; l != nil && m.key != "" {
		if l.unsettled--; l.unsettled == 0 {
			h.emptied(l)
		}
	}
	notify(h.space)
}

// confirm records that the broker has accepted messages: their rows may go, and
// the next of their keys may come.
func (h *hand) confirm(ms []*message) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range ms {
		h.freePlace(m)
		h.endTrial(m)
		h.next(m)
		h.bytes -= len(m.payload)
		m.payload = nil
	}
	h.confirmed = append(h.confirmed, ms...)
	notify(h.settle)
}

// refuse records that the broker will not have a message now. It blocks its key, once
// it is parked.
func (h *hand) refuse(v verdict) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.refuseOne(v)
	notify(h.settle)
}

func (h *hand) refuseOne(v verdict) {
	h.freePlace(v.message)
	h.endTrial(v.message)
	h.verdict(v)
}

// block parks a message behind the head of its key.
func (h *hand) block(m *message) {
	h.taken[m.lane]++
	h.verdict(verdict{message: m, reason: "blocked"})
	notify(h.settle)
}

func (h *hand) verdict(v verdict) {
	h.refusing++
	h.refused = append(h.refused, v)
}

// retry takes back a message whose fate is unknown: it is published again.
func (h *hand) retry(m *message) { h.retryAll([]*message{m}) }

func (h *hand) retryAll(ms []*message) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range ms {
		h.taken[m.lane]--
		h.freePlace(m)
		if m.alone {
			h.pushAlone(m)
		} else {
			h.push(m)
		}
	}
}

// idle says that nothing of a lane is under way.
func (h *hand) idle(lane int) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.taken[lane] == 0
}

// empty says that nothing of a lane is in the hand.
func (h *hand) empty(lane int) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.unsettled[lane] == 0
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
