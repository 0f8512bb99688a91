package relay

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// channel publishes with at most window messages in flight.
type channel struct {
	*session
	ch      *amqp.Channel
	slots   chan struct{}
	waiters sync.WaitGroup
	closed  chan struct{} // closed when the channel is, after cause was set
	cause   *amqp.Error   // nil: we closed it

	mu       sync.Mutex
	returns  chan amqp.Return
	returned map[returnKey][]amqp.Return
	orphans  []*message // their fate was unknown when the channel closed
}

// returnKey recognises a returned message. An ID alone does not do: a producer
// may send one ID to two destinations. One that writes an ID twice for one
// destination has two returns.
type returnKey struct{ messageID, exchange, routingKey string }

func (s *session) newChannel(window int) (*channel, error) {
	stop := time.AfterFunc(s.relay.pub.cfg.ConfirmTimeout, s.conn.Cut)
	defer stop.Stop()
	ch, err := s.conn.Channel()
	if err != nil {
		return nil, err
	}
	if err := ch.Confirm(false); err != nil {
		return nil, err
	}
	c := &channel{
		session: s,
		ch:      ch,
		slots:   make(chan struct{}, window),
		closed:  make(chan struct{}),
		// One place for each message in flight: the client drops what finds the
		// channel full for 5 s, and a return that is lost is a message lost.
		returns:  ch.NotifyReturn(make(chan amqp.Return, window+1)),
		returned: make(map[returnKey][]amqp.Return),
	}
	causes := ch.NotifyClose(make(chan *amqp.Error, 1))
	s.watchers.Go(func() { c.cause = <-causes; close(c.closed) })
	return c, nil
}

// publish takes messages until ctx ends or the channel closes.
func (c *channel) publish(ctx context.Context, queue <-chan *message) {
	for {
		select {
		case c.slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		var m *message
		select {
		case m = <-queue:
		case <-ctx.Done():
			return
		case <-c.closed:
			return
		}
		select {
		case <-c.gate():
		case <-ctx.Done():
		}
		if !c.send(ctx, m) {
			return
		}
	}
}

// send publishes one message and leaves a goroutine to await the answer. It
// returns false if the channel is of no more use.
func (c *channel) send(ctx context.Context, m *message) bool {
	r := c.relay
	if !r.leases.mayPublish(m) {
		r.suspects.forget(m)
		r.hand.drop(m)
		<-c.slots
		return true
	}
	r.hand.take(m)
	if ctx.Err() != nil {
		r.hand.retry(m)
		return false
	}
	if !m.alone && !r.suspects.admit(m) {
		if m.alone {
			r.hand.retry(m) // as the probe
		} else {
			r.refuse(m, suspected, "")
		}
		<-c.slots
		return true
	}
	msg, err := m.publishing()
	if err != nil {
		r.refuse(m, impossible, err.Error())
		<-c.slots
		return true
	}
	confirm, err := c.ch.PublishWithDeferredConfirm(m.exchange, m.routingKey, true, false, msg)
	if err != nil {
		// Written in part, perhaps: the channel's close decides what this means.
		c.orphan(m)
		return false
	}
	c.waiters.Go(func() { c.await(m, confirm) })
	return true
}

// await turns the broker's answer into a verdict.
func (c *channel) await(m *message, confirm *amqp.DeferredConfirmation) {
	defer func() { <-c.slots }()
	limit := c.relay.pub.cfg.ConfirmTimeout
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for answered := false; !answered; {
		select {
		case <-confirm.Done():
			answered = true
		case <-timer.C:
			if !c.isBlocked() {
				c.fail(fmt.Errorf("no answer from the broker within %s", limit))
				c.conn.Cut() // resolves all that is in flight
			}
			timer.Reset(limit)
		}
	}
	switch {
	case confirm.Acked():
		if ret, ok := c.returnOf(m); ok {
			c.relay.refuse(m, returned, fmt.Sprintf("returned by the broker: %d %s", ret.ReplyCode, ret.ReplyText))
		} else {
			c.relay.confirmed(m)
		}
	case c.ch.IsClosed() || c.conn.IsClosed():
		c.orphan(m) // a closed channel answers like a nack
	default:
		c.relay.refuse(m, nacked, "nacked by the broker")
	}
}

// returnOf looks for the return of a message that was confirmed. The client
// delivers a return before it resolves the confirm, so it is here by now.
func (c *channel) returnOf(m *message) (amqp.Return, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		select {
		case ret, ok := <-c.returns:
			if !ok {
				return c.takeReturn(m)
			}
			key := returnKey{ret.MessageId, ret.Exchange, ret.RoutingKey}
			c.returned[key] = append(c.returned[key], ret)
		default:
			return c.takeReturn(m)
		}
	}
}

func (c *channel) takeReturn(m *message) (amqp.Return, bool) {
	key := returnKey{m.messageID.String(), m.exchange, m.routingKey}
	all := c.returned[key]
	if len(all) == 0 {
		return amqp.Return{}, false
	}
	if c.returned[key] = all[1:]; len(all) == 1 {
		delete(c.returned, key)
	}
	return all[0], true
}

func (c *channel) orphan(m *message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.orphans = append(c.orphans, m)
}

// exchangeName finds the exchange that a channel exception names.
var exchangeName = regexp.MustCompile(`exchange '([^']*)'`)

// settleOrphans decides on the messages that were in flight when the channel
// closed. If the broker closed only this channel, one of them is the culprit: the
// exchange that it names, or else whichever fails again when it is alone.
func (c *channel) settleOrphans() {
	if len(c.orphans) == 0 {
		return
	}
	<-c.closed
	r := c.relay
	if c.cause == nil || c.conn.IsClosed() {
		for _, m := range c.orphans {
			r.unknown(m)
		}
		return
	}
	exchange, named := c.culprit()
	for _, m := range c.orphans {
		switch {
		case named && m.exchange == exchange:
			r.refuse(m, missing, c.cause.Error())
		case !named && len(c.orphans) == 1:
			r.refuse(m, impossible, c.cause.Error())
		default:
			m.alone = m.alone || !named
			r.unknown(m)
		}
	}
}

// culprit returns the exchange that the broker named when it closed the channel
// because there is none, or because we may not write to it.
func (c *channel) culprit() (exchange string, named bool) {
	if c.cause.Code != amqp.NotFound && c.cause.Code != amqp.AccessRefused {
		return "", false
	}
	if len(c.orphans) == 1 {
		return c.orphans[0].exchange, true
	}
	found := exchangeName.FindStringSubmatch(c.cause.Reason)
	if found == nil {
		return "", false
	}
	exchange = found[1]
	if exchange == "amq.default" {
		exchange = "" // as it is on the wire
	}
	return exchange, slices.ContainsFunc(c.orphans, func(m *message) bool { return m.exchange == exchange })
}
