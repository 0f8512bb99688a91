package relay

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// isolation looks for the message that ends connections, or after which no answer comes.
// What was in flight at two such ends is published apart from all others, on connections
// of its own, and by halves while these end too.
type isolation struct {
	mu     sync.Mutex
	groups []group
	some   chan struct{}
}

// group is messages to be published apart.
type group struct {
	messages []*message
	alone    int       // connections ended while there was one message on them
	through  int64     // messages that the relay had published when it came to be
	after    time.Time // not before
}

// died returns those of the messages in flight at the end of a connection that may
// go out among others again; the rest is to be published apart. Whatever else that was
// to show, others show instead.
func (r *Relay) died(inFlight []*message, ordered bool) (others []*message) {
	if ordered {
		return inFlight
	}
	var twice []*message
	for _, m := range inFlight {
		if m.deaths++; m.deaths > 1 {
			twice = append(twice, m)
		} else {
			others = append(others, m)
		}
	}
	if len(twice) > 0 {
		r.suspects.forget(twice...)
		r.hand.endTrials(twice)
		// By destination, so that halves part them.
		slices.SortStableFunc(twice, func(a, b *message) int {
			return cmp.Or(cmp.Compare(a.exchange, b.exchange), cmp.Compare(a.routingKey, b.routingKey))
		})
		r.isolation.add(group{messages: twice, through: r.counts.published.Load()})
	}
	return others
}

func (i *isolation) add(groups ...group) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.groups = append(groups, i.groups...) // what has been halved most goes first
	notify(i.some)
}

// take returns the next group, or how long none is due.
func (i *isolation) take() (g group, wait time.Duration) {
	i.mu.Lock()
	defer i.mu.Unlock()
	wait = time.Hour
	for at, g := range i.groups {
		left := time.Until(g.after)
		if left <= 0 {
			i.groups = slices.Delete(i.groups, at, at+1)
			if len(i.groups) > 0 {
				notify(i.some) // for another isolator
			}
			return g, 0
		}
		wait = min(wait, left, lostEvery)
	}
	return group{}, wait
}

// lostEvery is how often it is seen that the lane of what waits is ours no more.
const lostEvery = time.Second

// remove takes messages out of their groups.
func (i *isolation) remove(which func(*message) bool) (removed []*message) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for at := range i.groups {
		g := &i.groups[at]
		g.messages = slices.DeleteFunc(g.messages, func(m *message) bool {
			out := which(m)
			if out {
				removed = append(removed, m)
			}
			return out
		})
	}
	i.groups = slices.DeleteFunc(i.groups, func(g group) bool { return len(g.messages) == 0 })
	return removed
}

// clear returns all messages that were to be published apart.
func (i *isolation) clear() (all []*message) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, g := range i.groups {
		all = append(all, g.messages...)
	}
	i.groups = nil
	return all
}

// wasOrdered says that the end of a connection was ordered, by an operator of the
// broker or by us, so that no message caused it.
func wasOrdered(cause error) bool {
	var closed *amqp.Error
	return !errors.As(cause, &closed) || closed.Code == amqp.ConnectionForced
}

// isolators is how many groups are published at the same time.
const isolators = 4

// isolate publishes apart what may have ended connections, until ctx ends.
func (r *Relay) isolate(ctx, hard context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-r.isolation.some:
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		for _, m := range r.isolation.remove(func(m *message) bool { return !r.leases.mayPublish(m, since()) }) {
			r.hand.drop(m)
		}
		g, wait := r.isolation.take()
		if len(g.messages) > 0 {
			r.isolateOne(ctx, hard, g)
		}
		timer.Reset(wait)
	}
}

// isolateOne publishes a group; if one of it ends the connection each half of it is
// next. One message that does so time and again is dead, once others have got
// through meanwhile: until then it may be the broker. One that has no answer is suspect.
func (r *Relay) isolateOne(ctx, hard context.Context, g group) {
	unsent, tried := g.messages, since()
	end, err := r.publishApart(ctx, hard, len(unsent), false, source{
		take: func(limit int) []*message {
			n := min(limit, len(unsent))
			taken := unsent[:n]
			unsent = unsent[n:]
			return taken
		},
		back: func(ms []*message) { unsent = append(ms, unsent...) },
	})
	n := len(end.inFlight)
	if len(unsent) > 0 {
		wait := time.Second // nobody knows what ended the connection, or kept us from it
		if err == nil && n > 0 {
			wait = 0
		}
		r.isolation.add(g.again(unsent, wait))
	}
	switch {
	case n == 0:
	case end.stalled && n == 1:
		r.refuse(end.inFlight[0], unanswered, "it has no answer")
	case end.ordered && !end.stalled:
		r.isolation.add(g.again(end.inFlight, time.Second))
	case n > 1:
		r.isolation.add(g.again(end.inFlight[:n/2], 0), g.again(end.inFlight[n/2:], 0))
	default:
		alone := len(g.messages) == 1 && r.stood(ctx, tried)
		g = g.again(end.inFlight, 0)
		if alone {
			g.alone++
		}
		if g.alone > 1 && r.counts.published.Load() > g.through {
			r.refuse(g.messages[0], impossible, "the connection to the broker ends each time this message is published, also when it is alone")
			return
		}
		if g.alone > 1 {
			g.after = time.Now().Add(backOff(g.alone))
		}
		r.isolation.add(g)
	}
}

// stood says that the common connection has stood since then, so that what ended
// another was not something that ends all.
func (r *Relay) stood(ctx context.Context, then int64) bool {
	_ = pause(ctx, endTogether) // at a stop what follows decides nothing
	up := r.upSince.Load()
	return up != 0 && up < then
}

// endTogether is longer than it takes until all connections of which a fault is the end
// are known to have ended.
const endTogether = 200 * time.Millisecond

// again is the group with those of its messages that are left, to be published after
// a pause.
func (g group) again(messages []*message, pause time.Duration) group {
	g.messages, g.after = messages, time.Now().Add(pause)
	return g
}

func (r *Relay) unknownAll(ms []*message) {
	for _, m := range ms {
		r.unknown(m)
	}
}
