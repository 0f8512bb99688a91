package relay

import (
	"context"
	"errors"
	"fmt"
	"sync"
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

	watchers sync.WaitGroup // they end with the connection

	mu      sync.Mutex
	open    chan struct{} // closed while the broker takes messages
	blocked bool
}

var errStopped = errors.New("relay is stopping")

// publish runs a session until ctx ends (nil: everything in flight was answered)
// or the connection fails. After hard ends it does not wait for answers.
func (r *Relay) publish(ctx, hard context.Context, conn *rabbit.Conn) error {
	ctx, fail := context.WithCancelCause(ctx)
	s := &session{relay: r, conn: conn, fail: fail, open: make(chan struct{})}
	close(s.open)
	stop := context.AfterFunc(hard, func() { fail(errStopped); conn.Cut() })
	defer stop()

	var publishers sync.WaitGroup
	closed := conn.NotifyClose(make(chan *amqp.Error, 1))
	blockings := conn.NotifyBlocked(make(chan amqp.Blocking, 16))
	s.watchers.Go(func() { s.watch(closed, blockings) })
	for range channels {
		publishers.Go(func() { s.serve(ctx, r.hand.ready, window) })
	}
	publishers.Go(func() { s.serve(ctx, r.hand.probes, 1) })
	publishers.Wait()
	if cause := context.Cause(ctx); errors.Is(cause, context.Canceled) {
		timer := time.AfterFunc(time.Second, conn.Cut)
		conn.Close() // all is confirmed; how the goodbye went does not matter
		timer.Stop()
	}
	conn.Cut()
	s.watchers.Wait()
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
		return cause
	}
	return nil
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
	if active {
		s.open = make(chan struct{})
		s.relay.blocked.set(fmt.Errorf("broker takes no messages: %s", reason))
	} else {
		close(s.open)
		s.relay.blocked.set(nil)
	}
}

// gate returns a channel that is closed while the broker takes messages.
func (s *session) gate() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.open
}

func (s *session) isBlocked() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.blocked
}

// serve publishes what queue brings, on one channel after another: the broker
// closes a channel for a message that it cannot take at all.
func (s *session) serve(ctx context.Context, queue <-chan *message, window int) {
	for ctx.Err() == nil {
		c, err := s.newChannel(window)
		if err != nil {
			s.fail(fmt.Errorf("open channel: %w", err))
			return
		}
		c.publish(ctx, queue)
		c.waiters.Wait()
		c.settleOrphans()
	}
}
