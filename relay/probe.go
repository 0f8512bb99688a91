package relay

import (
	"context"
	"slices"
)

// probe publishes what is to be published alone, until ctx ends: the probes of
// suspects, what is on trial, and what may have closed a channel. Each time it does
// so on a connection of its own, since a channel that waits for a queue that does
// not answer cannot even be closed.
func (r *Relay) probe(ctx, hard context.Context) {
	wait := newBackOff()
	for {
		select {
		case <-r.hand.probes:
		case <-ctx.Done():
			return
		}
		end, err := r.publishApart(ctx, hard, 1, true, source{take: r.hand.takeAlone, back: r.hand.retryAll})
		if err != nil { // the other connection's condition tells
			_ = pause(ctx, wait.NextBackOff()) // its end is seen next time
			notify(r.hand.probes)
			continue
		}
		wait.Reset()
		for _, m := range end.inFlight {
			if m == end.overdue {
				r.refuse(m, silent, "its destination does not answer")
			} else {
				r.unknownAll(r.isolation.died([]*message{m}, end.explained, r.counts.published.Load()))
			}
		}
	}
}

// takeAlone takes the next message that is to be published alone: first those on trial,
// for which others wait.
func (h *hand) takeAlone(int) []*message {
	h.mu.Lock()
	defer h.mu.Unlock()
	i := slices.IndexFunc(h.alone, func(m *message) bool { return m.onTrial })
	if i < 0 {
		if len(h.alone) == 0 || h.probing >= probers/2 {
			return nil
		}
		i = 0
		h.alone[0].probing = true
		h.probing++
	}
	m := h.alone[i]
	h.alone = slices.Delete(h.alone, i, i+1)
	h.taken[m.lane]++
	if len(h.alone) > 0 {
		notify(h.probes)
	}
	return []*message{m}
}
