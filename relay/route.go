package relay

import (
	"cmp"
	"slices"
	"time"
)

// route is the messages in the hand that go to one destination. Those that are
// ready are taken in turn with other destinations', and each has its share of the
// window, half of it among two, a quarter among four or more: one that answers
// slowly would stop the others.
type route struct {
	destination
	ready    []*message
	bytes    int // of their payloads
	inFlight int
	inTurn   bool
}

const (
	shares = 4 // a destination has a quarter of the window at least
	// slowAfter is more than a hand full of messages for one destination takes.
	slowAfter = time.Second
)

// share is how many messages of one destination may be in flight.
func (h *hand) share() int { return channels * window / min(shares, max(1, len(h.routes))) }

// push makes m ready to be taken.
func (h *hand) push(m *message) {
	r := h.routes[m.destination]
	if r == nil {
		r = &route{destination: m.destination}
		h.routes[m.destination] = r
	}
	m.route, m.readyAt = r, since()
	r.ready = append(r.ready, m)
	r.bytes += len(m.payload)
	h.offer(r)
}

// offer puts a route into the turn if something may be taken of it.
func (h *hand) offer(r *route) {
	if !r.inTurn && len(r.ready) > 0 && r.inFlight < h.share() && !h.onTrial[r.destination] {
		r.inTurn = true
		h.turn = append(h.turn, r)
		notify(h.some)
	}
}

// take takes at most limit messages to publish, which its caller confirms, refuses,
// drops or retries.
func (h *hand) take(limit int) (taken []*message) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for len(taken) < limit && len(h.turn) > 0 {
		r := h.turn[0]
		h.turn[0], h.turn = nil, h.turn[1:]
		r.inTurn = false
		if h.onTrial[r.destination] {
			continue // the end of the trial offers it again
		}
		n := max(0, min(len(r.ready), limit-len(taken), h.share()-r.inFlight))
		for _, m := range r.ready[:n] {
			r.bytes -= len(m.payload)
			h.taken[m.lane]++
		}
		taken = append(taken, r.ready[:n]...)
		clear(r.ready[:n])
		r.ready = r.ready[n:]
		r.inFlight += n
		h.inFlight += n
		h.offer(r)
	}
	if len(h.turn) > 0 {
		notify(h.some)
	}
	return taken
}

// endTrial lets a destination go on, now that m has shown whether it answers.
func (h *hand) endTrial(m *message) {
	if !m.onTrial {
		return
	}
	m.onTrial = false
	delete(h.onTrial, m.destination)
	if r := h.routes[m.destination]; r != nil {
		h.offer(r)
	}
}

// endTrials lets destinations go on, though nothing has shown whether they answer.
func (h *hand) endTrials(ms []*message) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range ms {
		h.endTrial(m)
	}
}

// freePlace gives the place of m in the window to another.
func (h *hand) freePlace(m *message) {
	r := m.route
	if r == nil {
		return
	}
	m.route = nil
	r.inFlight--
	h.inFlight--
	if r.inFlight == 0 && len(r.ready) == 0 {
		delete(h.routes, r.destination)
	}
	h.offer(r)
}

// isSlow says that messages wait in a route for longer than slowAfter, though they have
// their share of the window, or that its destination has yet to show that it answers.
func (h *hand) isSlow(r *route) bool {
	if r == nil || len(r.ready) == 0 {
		return false
	}
	return h.onTrial[r.destination] || r.inFlight >= h.share() && since()-r.ready[0].readyAt > int64(slowAfter)
}

// apart gives the places of messages in the window to others. They stay taken.
func (h *hand) apart(ms []*message) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range ms {
		h.freePlace(m)
	}
}

// try takes back what was in flight when answers ceased to come. One message of
// each destination is published alone, the first that had no answer; the others wait
// until that has shown whether the destination answers.
func (h *hand) try(ms []*message) {
	slices.SortFunc(ms, func(a, b *message) int { return cmp.Compare(a.sentAt, b.sentAt) })
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range ms {
		h.taken[m.lane]--
		h.freePlace(m)
		if !m.alone && !h.onTrial[m.destination] {
			h.onTrial[m.destination] = true
			m.alone, m.onTrial, m.patience = true, true, silentAfter
		}
		if m.alone {
			h.pushAlone(m)
		} else {
			h.push(m)
		}
	}
}
