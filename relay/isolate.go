package relay

import (
	"context"
	"errors"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// isolation looks for the message that ends connections. What was in flight at two
// such ends in a row is published apart from all others, on connections of its
// own, and by halves while these end too.
type isolation struct {
	mu     sync.Mutex
	before map[int64]bool // in flight when a connection last died
	groups [][]*message
	some   chan struct{}
}

// died returns those of the messages in flight at the end of a connection that may
// go out among others again; the rest is to be published apart.
func (i *isolation) died(inFlight []*message, explained bool) (others []*message) {
	i.mu.Lock()
	defer i.mu.Unlock()
	before := i.before
	i.before = nil
	if explained {
		return inFlight
	}
	i.before = make(map[int64]bool, len(inFlight))
	var group []*message
	for _, m := range inFlight {
		i.before[m.id] = true
		if before[m.id] {
			group = append(group, m)
		} else {
			others = append(others, m)
		}
	}
	if len(group) > 0 {
		i.groups = append(i.groups, group)
		notify(i.some)
	}
	return others
}

func (i *isolation) take() (group []*message) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if len(i.groups) > 0 {
		group, i.groups = i.groups[0], i.groups[1:]
	}
	if len(i.groups) > 0 {
		notify(i.some)
	}
	return group
}

// explained says that the end of a connection was ordered, by an operator of the
// broker or by us, so that no message caused it.
func explained(cause error) bool {
	var closed *amqp.Error
	return !errors.As(cause, &closed) || closed.Code == amqp.ConnectionForced
}

// isolate publishes apart what may have ended connections, until ctx ends.
func (r *Relay) isolate(ctx, hard context.Context) {
	for {
		select {
		case <-r.isolation.some:
			r.halve(ctx, hard, r.isolation.take())
		case <-ctx.Done():
			for group := r.isolation.take(); group != nil; group = r.isolation.take() {
				r.unknownAll(group)
			}
			return
		}
	}
}

// halve publishes a group, and if that ends the connection each half of it. One
// message that does so time and again is dead, once others have got through
// meanwhile: until then it may be the broker.
func (r *Relay) halve(ctx, hard context.Context, group []*message) {
	through := r.counts.published.Load()
	for alone := 0; len(group) > 0; {
		if len(group) == 1 {
			alone++
		}
		left := r.publishApart(ctx, hard, group)
		switch {
		case ctx.Err() != nil:
			r.unknownAll(left)
			return
		case len(left) > 1:
			r.halve(ctx, hard, left[:len(left)/2])
			r.halve(ctx, hard, left[len(left)/2:])
			return
		case len(left) == 1 && alone > 1 && r.counts.published.Load() > through:
			r.refuse(left[0], impossible, "the connection to the broker ends each time this message is published, also when it is alone")
			return
		}
		if group = left; alone > 1 {
			_ = pause(ctx, backOff(alone)) // publishApart sees the end of ctx
		}
	}
}

// publishApart publishes a group on a connection of its own, and returns what was
// in flight when that ended.
func (r *Relay) publishApart(ctx, hard context.Context, group []*message) []*message {
	wait := newBackOff()
	conn, err := r.pub.connect(ctx)
	for err != nil {
		if pause(ctx, wait.NextBackOff()) != nil {
			return group
		}
		conn, err = r.pub.connect(ctx)
	}
	ctx, s := r.newSession(ctx, conn)
	stop := context.AfterFunc(hard, func() { s.fail(errStopped); conn.Cut() })
	defer stop()
	c, err := s.newChannel(len(group), false)
	if err == nil {
		c.publish(ctx, source{take: func(limit int) []*message {
			n := min(limit, len(group))
			taken := group[:n]
			group = group[n:]
			return taken
		}})
	}
	s.end()
	return append(s.orphans, group...) // with what was not sent
}

func (r *Relay) unknownAll(ms []*message) {
	for _, m := range ms {
		r.unknown(m)
	}
}

// quickly bounds a goodbye that does not matter.
const quickly = time.Second
