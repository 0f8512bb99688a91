package relay

// What the hand knows of messages that have a verdict: they wait for the settler.

// toSettle hands over at most max confirmed and max refused messages.
func (h *hand) toSettle(max int) (confirmed []*message, refused []verdict) {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := min(max, len(h.confirmed))
	confirmed, h.confirmed = h.confirmed[:n:n], h.confirmed[n:]
	n = min(max, len(h.refused))
	refused, h.refused = h.refused[:n:n], h.refused[n:]
	if len(h.confirmed)+len(h.refused) > 0 {
		notify(h.settle)
	}
	return confirmed, refused
}

// muchToSettle says that waiting for more would gain nothing.
func (h *hand) muchToSettle() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.confirmed)+len(h.refused) >= settleRows
}

// deleted records that the statement which removes the row of a confirmed message has
// returned.
func (h *hand) deleted(m *message) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.settled(m)
}

// recorded records that the statement which parks a refused message has returned. Only
// then is what follows it parked too: it must never stand in outbox_parked before it.
func (h *hand) recorded(v verdict) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.refusing--
	if l := h.lines[v.key]; l != nil && v.key != "" && v.reason != "blocked" {
		l.blocked, l.busy, l.headParked = true, false, true
		waiting := l.waiting
		l.waiting, l.waitBytes = nil, 0
		for _, m := range waiting {
			h.waits(m, -1)
			if m.parked {
				h.forget(m) // it is behind the head already
			} else {
				h.block(m)
			}
		}
	}
	h.settled(v.message)
}

// giveUp forgets a refused message that could not be parked while its lane was ours.
func (h *hand) giveUp(v verdict) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.refusing--
	h.taken[v.lane]--
	if v.reason != "blocked" {
		h.next(v.message)
	}
	h.forget(v.message)
}

// settled counts out a message whose row is no longer as it was read.
func (h *hand) settled(m *message) {
	if !m.aside {
		h.taken[m.lane]--
		h.unsettled[m.lane]--
		h.uncount(m)
	}
	notify(h.space)
	h.gone = append(h.gone, m.id)
}

// putAside counts a confirmed message, whose row cannot be deleted yet, out of its lane
// and its line: they need not wait for it. If its row is still there when another owns
// the lane, the message is published twice.
func (h *hand) putAside(m *message) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !m.aside {
		m.aside = true
		h.taken[m.lane]--
		h.unsettled[m.lane]--
		h.uncount(m)
	}
}

// quiet says that no verdict is on its way to the tables.
func (h *hand) quiet() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.refusing == 0
}
