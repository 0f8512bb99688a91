package relay

import "context"

// queue is messages that are to be published alone.
type queue struct {
	messages []*message
	some     chan struct{} // one may be taken
}

// pushAlone makes m ready to be published alone.
func (h *hand) pushAlone(m *message) {
	q := &h.probes
	if m.onTrial || m.patience == 0 {
		q = &h.trials
	}
	q.messages = append(q.messages, m)
	notify(q.some)
}

// takeAlone takes the next message that is to be published alone: first those on trial,
// for which others wait, and what may have closed a channel. The probes of suspects, many
// of which may have no answer, come after them.
func (h *hand) takeAlone(trialsOnly bool) []*message {
	h.mu.Lock()
	defer h.mu.Unlock()
	q := &h.trials
	if len(q.messages) == 0 && !trialsOnly {
		q = &h.probes
	}
	if len(q.messages) == 0 {
		return nil
	}
	m := q.messages[0]
	q.messages[0], q.messages = nil, q.messages[1:]
	h.taken[m.lane]++
	for _, q := range []*queue{&h.trials, &h.probes} {
		if len(q.messages) > 0 {
			notify(q.some)
		}
	}
	return []*message{m}
}

// probe publishes what is to be published alone, until ctx ends: what is on trial or may
// have closed a channel, and, if it is not kept for that, the probes of suspects. Each
// time it does so on a connection of its own, since a channel that waits for a queue that
// does not answer cannot even be closed.
func (r *Relay) probe(ctx, hard context.Context, trialsOnly bool) {
	trials, probes := r.hand.trials.some, r.hand.probes.some
	if trialsOnly {
		probes = nil
	}
	from := source{take: func(int) []*message { return r.hand.takeAlone(trialsOnly) }, back: r.hand.retryAll}
	wait := newBackOff()
	for {
		var woken chan struct{}
		select {
		case <-trials:
			woken = trials
		case <-probes:
			woken = probes
		case <-ctx.Done():
			return
		}
		end, err := r.publishApart(ctx, hard, 1, true, from)
		if err != nil { // the other connection's condition tells
			_ = pause(ctx, wait.NextBackOff()) // its end is seen next time
			notify(woken)
			continue
		}
		wait.Reset()
		for _, m := range end.inFlight {
			if m == end.overdue {
				r.refuse(m, silent, notAnswering)
			} else {
				r.unknownAll(r.died([]*message{m}, end.ordered))
			}
		}
	}
}
