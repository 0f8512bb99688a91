package relay

import "context"

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
