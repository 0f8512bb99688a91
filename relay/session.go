package relay

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/internal/rabbit"
)

// session is one connection to the broker with its channels. It ends at the first
// failure of the connection; whatever was in flight on it then is published
// again on the next.
type session struct {
	relay *Relay
	conn  *rabbit.Conn
	fail  context.CancelCauseFunc

	unhook       func() bool    // from the end of a clean stop's time
	watchers     sync.WaitGroup // they end with the connection
	lastAnswered atomic.Int64   // when the latest message that has an answer was sent
	stalled      atomic.Bool    // it was given up for want of answers
	alert        atomic.Bool    // and for alertFor that is done sooner

	mu      sync.Mutex
	open    chan struct{} // closed while the broker takes messages
	openAt  int64         // since when, by our monotonic clock
	alarmed bool
	orphans []*message // in flight at the end of the connection
}

var errStopped = errors.New("relay is stopping")

// newSession watches conn until end; the context ends with it, too. After hard ends
// nothing on it is waited for.
func (r *Relay) newSession(ctx, hard context.Context, conn *rabbit.Conn) (context.Context, *session) {
	ctx, fail := context.WithCancelCause(ctx)
	s := &session{relay: r, conn: conn, fail: fail, open: make(chan struct{})}
	close(s.open)
	s.unhook = context.AfterFunc(hard, func() { fail(errStopped); conn.Cut() })
	closed := conn.NotifyClose(make(chan *amqp.Error, 1))
	blockings := conn.NotifyBlocked(make(chan amqp.Blocking, 16))
	s.watchers.Go(func() { s.watch(closed, blockings) })
	return ctx, s
}

// publish runs a session until ctx ends (nil: everything in flight was answered)
// or the connection fails. After hard ends it does not wait for answers.
func (r *Relay) publish(ctx, hard context.Context, conn *rabbit.Conn) error {
	ctx, s := r.newSession(ctx, hard, conn)
	var publishers sync.WaitGroup
	for range channels {
		publishers.Go(func() { s.serve(ctx, source{r.hand.take, r.hand.retryAll, r.hand.some}) })
	}
	publishers.Wait()
	cause := context.Cause(ctx)
	stopping := errors.Is(cause, context.Canceled)
	s.end()
	r.hand.apart(s.orphans)
	ordered := !s.stalled.Load() && (stopping || wasOrdered(cause))
	others := r.died(s.orphans, ordered)
	if s.stalled.Load() {
		if s.alert.Load() {
			r.stalledAt.Store(since())
		}
		r.counts.unknown.Add(int64(len(others)))
		r.hand.try(others)
	} else {
		r.unknownAll(others)
	}
	if stopping {
		return nil
	}
	return cause
}

// quickly bounds a goodbye that does not matter.
const quickly = time.Second

// end closes the connection and waits for those that watch it. When it is called
// for a stop all is confirmed: how the goodbye goes does not matter.
func (s *session) end() {
	timer := time.AfterFunc(quickly, s.conn.Cut)
	s.conn.Close()
	timer.Stop()
	s.conn.Cut()
	s.watchers.Wait()
	s.unhook()
}

// apartEnd is how publishing apart has ended.
type apartEnd struct {
	inFlight []*message // at the end of the connection
	overdue  *message   // of those, the one that had no answer in time, alone
	ordered  bool       // no message caused the end
	stalled  bool       // the end was ours, since answers ceased to come
}

// publishApart publishes what there is in a source on a connection of its own.
func (r *Relay) publishApart(ctx, hard context.Context, window int, prober bool, from source) (apartEnd, error) {
	conn, err := r.pub.connect(ctx)
	if err != nil {
		return apartEnd{}, err
	}
	ctx, s := r.newSession(ctx, hard, conn)
	c, err := s.newChannel(window, prober)
	if err != nil {
		s.end()
		return apartEnd{}, err
	}
	c.isolated = !prober
	c.publish(ctx, from)
	s.end()
	r.hand.apart(s.orphans)
	return apartEnd{s.orphans, c.overdue, wasOrdered(context.Cause(ctx)), s.stalled.Load()}, nil // the cause is known when all has ended
}

// watch notices the end of the connection, and alarms that make the broker stop
// reading from it.
func (s *session) watch(closed <-chan *amqp.Error, blockings <-chan amqp.Blocking) {
	for blockings != nil {
		b, ok := <-blockings
		if !ok {
			break
		}
		s.alarm(b.Active, b.Reason)
	}
	err := <-closed
	s.alarm(false, "")
	if err != nil {
		s.fail(fmt.Errorf("connection closed: %w", err))
	} else {
		s.fail(errors.New("connection closed"))
	}
}

// alarm notes that the broker takes no messages, or does again.
func (s *session) alarm(active bool, reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if active == s.alarmed {
		return
	}
	s.alarmed = active
	s.conn.SetBlocked(active)
	if active {
		s.open = make(chan struct{})
		s.relay.alarm.set(fmt.Errorf("broker takes no messages: %s", reason))
	} else {
		close(s.open)
		s.openAt = since()
		s.relay.alarm.set(nil)
	}
}

// gate returns a channel that is closed while the broker takes messages.
func (s *session) gate() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.open
}

// alarmedSince says whether the broker takes no messages, or since when it does.
func (s *session) alarmedSince() (alarmed bool, open int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.alarmed, s.openAt
}

// answered notes that a message has its answer which was sent at that time.
func (s *session) answered(at int64) {
	for {
		last := s.lastAnswered.Load()
		if at <= last || s.lastAnswered.CompareAndSwap(last, at) {
			return
		}
	}
}

// lost keeps what was in flight at the end of the connection.
func (s *session) lost(ms []*message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.orphans = append(s.orphans, ms...)
}

// serve publishes what a source brings, on one channel after another: the broker
// closes a channel for a message that it cannot take at all.
func (s *session) serve(ctx context.Context, from source) {
	for ctx.Err() == nil {
		c, err := s.newChannel(window, false)
		if err != nil {
			if s.conn.IsClosed() { // why, watch says
				_ = pause(ctx, quickly) // its end is what it waits for
			}
			s.fail(fmt.Errorf("open channel: %w", err))
			return
		}
		c.publish(ctx, from)
	}
}
