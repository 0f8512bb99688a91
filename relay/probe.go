package relay

import (
	"context"
	"fmt"
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
		conn, err := r.pub.connect(ctx)
		if err != nil { // the other connection's condition tells
			_ = pause(ctx, wait.NextBackOff()) // its end is seen next time
			notify(r.hand.probes)
			continue
		}
		probeCtx, s := r.newSession(ctx, conn)
		stop := context.AfterFunc(hard, func() { s.fail(errStopped); conn.Cut() })
		c, err := s.newChannel(1, true)
		if err == nil {
			wait.Reset()
			c.publish(probeCtx, source{take: r.hand.takeAlone, back: r.hand.retryAll})
		} else {
			s.fail(fmt.Errorf("open channel: %w", err))
			_ = pause(ctx, wait.NextBackOff()) // likewise
			notify(r.hand.probes)
		}
		s.end()
		cause := context.Cause(probeCtx) // is known when all has ended
		stop()
		r.hand.apart(s.orphans)
		for _, m := range s.orphans {
			if c != nil && m == c.overdue {
				r.refuse(m, silent, "its destination does not answer")
			} else {
				r.unknownAll(r.isolation.died([]*message{m}, explained(cause), r.counts.published.Load()))
			}
		}
	}
}
