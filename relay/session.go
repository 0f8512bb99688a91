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

	watchers     sync.WaitGroup // they end with the connection
	lastAnswered atomic.Int64   // when the latest message that has an answer was sent
	stalled      atomic.Bool    // it was given up for want of answers

	mu      sync.Mutex
	open    chan struct{} // closed while the broker takes messages
	openAt  int64         // since when, by our monotonic clock
	blocked bool
	orphans []*message // in flight at the end of the connection
}

var errStopped = errors.New("relay is stopping")

// newSession watches conn; the context ends with it, too.
func (r *Relay) newSession(ctx context.Context, conn *rabbit.Conn) (context.Context, *session) {
	ctx, fail := context.WithCancelCause(ctx)
	s := &session{relay: r, conn: conn, fail: fail, open: make(chan struct{})}
	close(s.open)
	closed := conn.NotifyClose(make(chan *amqp.Error, 1))
	blockings := conn.NotifyBlocked(make(chan amqp.Blocking, 16))
	s.watchers.Go(func() { s.watch(closed, blockings) })
	return ctx, s
}

// publish runs a session until ctx ends (nil: everything in flight was answered)
// or the connection fails. After hard ends it does not wait for answers.
func (r *Relay) publish(ctx, hard context.Context, conn *rabbit.Conn) error {
	ctx, s := r.newSession(ctx, conn)
	stop := context.AfterFunc(hard, func() { s.fail(errStopped); conn.Cut() })
	defer stop()

	var publishers sync.WaitGroup
	for range channels {
		publishers.Go(func() { s.serve(ctx, source{r.hand.take, r.hand.retryAll, r.hand.some}) })
	}
	publishers.Wait()
	cause := context.Cause(ctx)
	stopping := errors.Is(cause, context.Canceled)
	s.end()
	r.hand.apart(s.orphans)
	if s.stalled.Load() {
		r.stalledAt.Store(since())
		r.counts.unknown.Add(int64(len(s.orphans)))
		r.hand.try(s.orphans)
	} else {
		r.unknownAll(r.isolation.died(s.orphans, stopping || explained(cause), r.counts.published.Load()))
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
}

// watch notices the end of the connection, and alarms that make the broker stop
// reading from it.
func (s *session) watch(closed <-chan *amqp.Error, blockings <-chan amqp.Blocking) {
	for blockings != nil {
		b, ok := <-blockings
		if !ok {
			break
		}
		s.block(b.Active, b.Reason)
	}
	err := <-closed
	s.block(false, "")
	if err != nil {
		s.fail(fmt.Errorf("connection closed: %w", err))
	} else {
		s.fail(errors.New("connection closed"))
	}
}

func (s *session) block(active bool, reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if active == s.blocked {
		return
	}
	s.blocked = active
	s.conn.SetBlocked(active)
	if active {
		s.open = make(chan struct{})
		s.relay.blocked.set(fmt.Errorf("broker takes no messages: %s", reason))
	} else {
		close(s.open)
		s.openAt = since()
		s.relay.blocked.set(nil)
	}
}

// gate returns a channel that is closed while the broker takes messages.
func (s *session) gate() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.open
}

// blockedSince says whether the broker takes no messages, or since when it does.
func (s *session) blockedSince() (blocked bool, open int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.blocked, s.openAt
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
