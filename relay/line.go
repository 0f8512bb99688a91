package relay

// line is what the hand knows of a key. Of an open one, one message at a time is
// published and the others wait. A blocked one has a message in outbox_parked, its
// head, or on the way there: what follows is parked behind it, and only the head
// is published.
type line struct {
	lane       int16
	key        string
	busy       bool // one is ready, in flight, or on its way to outbox_parked
	unsettled  int  // messages in the hand
	blocked    bool
	headParked bool // its head waits for a time or a human, so there is no need to look
	waiting    []*message
	waitBytes  int
	passed     int64 // the first id that was passed over, since too many waited; 0: none
}

const (
	lineRows  = 256     // messages of a key that wait at most
	lineBytes = 1 << 20 // of their payloads
	lineLow   = 64      // so few, and what was passed over is read
)

// line returns the line of m's key.
func (h *hand) line(m *message) *line {
	l := h.lines[m.key]
	if l == nil {
		l = &line{lane: m.lane, key: m.key}
		h.lines[m.key] = l
	}
	return l
}

// passes says that m is passed over: it would have to wait behind too many, or
// behind one that was passed over.
func (l *line) passes(m *message, starving bool) bool {
	behind := l.passed != 0 && m.id >= l.passed
	crowded := l.busy && !l.blocked &&
		(len(l.waiting) >= lineRows || l.waitBytes >= lineBytes || starving && len(l.waiting) > 0)
	if crowded && !behind {
		l.passed = m.id
	}
	return crowded || behind
}

// wait puts m behind those of its key.
func (h *hand) wait(l *line, m *message) {
	l.waiting = append(l.waiting, m)
	l.waitBytes += len(m.payload)
	h.waits(m, 1)
}

// waits counts a message that begins (1) or ceases (-1) to wait.
func (h *hand) waits(m *message, n int) {
	h.waiting += n
	h.waitBytes += n * len(m.payload)
}

// next lets the message behind m follow.
func (h *hand) next(m *message) {
	if m.key == "" {
		return
	}
	l := h.lines[m.key]
	if l.busy = len(l.waiting) > 0; l.busy {
		first := l.waiting[0]
		l.waiting[0], l.waiting = nil, l.waiting[1:]
		l.waitBytes -= len(first.payload)
		h.waits(first, -1)
		h.push(first)
	}
}

// emptied forgets a line of which nothing is in the hand, unless something was
// passed over. A blocked one stays until readEnded.
func (h *hand) emptied(l *line) {
	switch {
	case l.blocked:
		if !l.headParked {
			h.changed = append(h.changed, blockedKey{l.lane, l.key})
		}
	case l.passed == 0:
		delete(h.lines, l.key)
	}
}

// passedOver returns keys that have room again for what was passed over, and the
// first such id.
func (h *hand) passedOver() (lines []*line, from int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for l := range h.passed {
		if len(l.waiting) <= lineLow || l.blocked {
			lines = append(lines, l)
			if from == 0 || l.passed < from {
				from = l.passed
			}
		}
		if len(lines) == pageRows {
			break
		}
	}
	return lines, from
}

// readmit adds what a read for lines has found, which misses nothing up to the id upTo.
func (h *hand) readmit(lines []*line, page []*message, upTo int64) (added int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, l := range lines {
		l.passed = 0
	}
	added = h.admitAll(page)
	for _, l := range lines {
		if l.passed == 0 && upTo != all {
			l.passed = upTo + 1
		}
		if l.passed == 0 {
			h.endPassing(l)
		}
	}
	return added
}

// startOver forgets what was passed over or blocked in the lanes that want says, since
// all of them is read anew, under another epoch or after a failure.
func (h *hand) startOver(want func(lane int16) bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, l := range h.lines {
		if want(l.lane) {
			l.blocked = l.blocked && l.unsettled > 0
			h.endPassing(l)
		}
	}
}

// endPassing records that nothing of a line was passed over.
func (h *hand) endPassing(l *line) {
	l.passed = 0
	delete(h.passed, l)
	if l.unsettled == 0 && !l.blocked {
		h.emptied(l)
	}
}
