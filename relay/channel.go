package relay

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/internal/failpoint"
)

// channel publishes with at most window messages in flight. One goroutine publishes
// and reads the answers: of a key whose messages follow each other the next goes out
// as soon as the answer to the last has come.
type channel struct {
	*session
	ch       *amqp.Channel
	prober   bool // it publishes what is alone
	isolated bool // it publishes what may have ended connections
	window   int
	pending  []flight      // in flight, in the order of sending
	closed   chan struct{} // closed when the channel is, after closeErr was set
	closeErr *amqp.Error   // nil: we closed it

	returns   chan amqp.Return
	returned  map[returnKey][]amqp.Return
	undecided []*message // their fate was unknown when the channel closed
	overdue   *message   // without an answer, so that the connection was given up

	answeredTag uint64        // the highest that has its answer
	sweep       time.Duration // until answers are looked for behind the oldest
	doubted     uint64        // the tag of the oldest, when others overtook it
	doubtedAt   int64
}

// flight is a message in flight.
type flight struct {
	*message
	confirm *amqp.DeferredConfirmation
}

// source is where a channel takes its messages, and gives back those that it did
// not send. Of one without some it takes until there is none.
type source struct {
	take func(limit int) []*message
	back func([]*message)
	some <-chan struct{}
}

// returnKey recognises a returned message. An ID alone does not do: a producer
// may send one ID to two destinations. One that writes an ID twice for one
// destination has two returns.
type returnKey struct {
	messageID string
	destination
}

// takeAtOnce is how many messages a channel takes at once.
const takeAtOnce = 32

func (s *session) newChannel(window int, prober bool) (*channel, error) {
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
		prober:  prober,
		window:  window,
		sweep:   sweepFirst,
		closed:  make(chan struct{}),
		// One place for each message in flight: the client drops what finds the
		// channel full for 5 s, and a return that is lost is a message lost.
		returns:  ch.NotifyReturn(make(chan amqp.Return, window+1)),
		returned: make(map[returnKey][]amqp.Return),
	}
	causes := ch.NotifyClose(make(chan *amqp.Error, 1))
	s.watchers.Go(func() { c.closeErr = <-causes; close(c.closed) })
	return c, nil
}

// publish takes messages until ctx ends, the channel closes, or the source has no
// more, and returns when everything that was sent has its answer.
func (c *channel) publish(ctx context.Context, from source) {
	timer := time.NewTimer(c.sweep)
	defer timer.Stop()
	for taking := true; ; {
		open := c.gate()
		if taking && isClosed(open) && len(c.pending) < c.window {
			taking = c.publishSome(ctx, from)
			if taking && from.some == nil && len(c.pending) == 0 {
				continue // nothing of what was taken was sent
			}
		}
		if !taking && len(c.pending) == 0 {
			break
		}
		var oldest, some, opened, ended, closed <-chan struct{} // of a nil channel nothing comes
		if len(c.pending) > 0 {
			oldest = c.pending[0].confirm.Done()
			timer.Reset(c.sweep)
		}
		if taking {
			ended, closed = ctx.Done(), c.closed
		}
		switch {
		case !taking || len(c.pending) == c.window:
		case isClosed(open):
			some = from.some
		default:
			opened = open
		}
		select {
		case <-oldest:
			c.collect(false)
		case <-timer.C:
			c.collect(true)
			c.doubt()
		case <-some:
		case <-opened:
		case <-ended:
			taking = false
		case <-closed:
			taking = false
		}
	}
	c.decide()
}

// publishSome publishes what there is and has room. It returns false if there is no
// more to do.
func (c *channel) publishSome(ctx context.Context, from source) bool {
	ms := from.take(min(takeAtOnce, c.window-len(c.pending)))
	for i, m := range ms {
		if stopped := ctx.Err() != nil; stopped || !isClosed(c.gate()) { // the broker stopped reading just now
			from.back(ms[i:])
			return !stopped
		}
		if !c.send(m) {
			from.back(ms[i+1:])
			return false
		}
	}
	return len(ms) > 0 || from.some != nil
}

// send publishes one message. It returns false if the channel is of no more use.
func (c *channel) send(m *message) bool {
	r := c.relay
	now := since()
	if !r.leases.mayPublish(m, now) {
		r.suspects.forget(m)
		r.hand.drop(m)
		return true
	}
	if !m.alone && !c.isolated && !r.suspects.admit(m) {
		if m.alone {
			r.hand.retry(m) // as the probe
		} else {
			r.refuse(m, suspected, "")
		}
		return true
	}
	msg, err := m.publishing()
	if err != nil {
		r.refuse(m, impossible, err.Error())
		return true
	}
	failpoint.Hit("relay/publish")
	confirm, err := c.ch.PublishWithDeferredConfirm(m.exchange, m.routingKey, true, false, msg)
	if err != nil {
		// Written in part, perhaps: the channel's close decides what this means.
		c.undecided = append(c.undecided, m)
		return false
	}
	failpoint.Hit("relay/published")
	m.sentAt = now
	c.pending = append(c.pending, flight{m, confirm})
	return true
}

// decide decides on the messages that were in flight when the channel
// closed. If the broker closed only this channel, one of them is the culprit: the
// exchange that it names, or else whichever fails again when it is alone.
func (c *channel) decide() {
	if len(c.undecided) == 0 {
		return
	}
	<-c.closed
	r := c.relay
	if c.conn.IsClosed() || c.closeErr == nil {
		c.lost(c.undecided)
		return
	}
	named := slices.ContainsFunc(c.undecided, func(m *message) bool { return c.names(m) != 0 })
	for _, m := range c.undecided {
		why := c.names(m)
		switch {
		case why != 0:
			r.refuse(m, why, c.closeErr.Error())
		case len(c.undecided) == 1 && c.isRefusal():
			r.refuse(m, missing, c.closeErr.Error())
		case len(c.undecided) == 1 && c.isVerdict():
			r.refuse(m, impossible, c.closeErr.Error())
		case len(c.undecided) == 1:
			r.refuse(m, failed, c.closeErr.Error())
		default:
			m.alone = m.alone || !named
			r.unknown(m)
		}
	}
}

// isRefusal says that the broker closed the channel because there is no such
// exchange, or because we may not write to it.
func (c *channel) isRefusal() bool {
	return c.closeErr.Code == amqp.NotFound || c.closeErr.Code == amqp.AccessRefused
}

// isVerdict says that the broker closed the channel because of what was published, and
// not, like 541, because something failed there.
func (c *channel) isVerdict() bool {
	return c.closeErr.Code == amqp.PreconditionFailed || c.closeErr.Code == amqp.ContentTooLarge || c.closeErr.Code == amqp.NotImplemented
}

// names says for what the broker, when it closed the channel, named the exchange
// or the topic of m, 0 for nothing.
func (c *channel) names(m *message) cause {
	exchange := m.exchange
	if exchange == "" {
		exchange = "amq.default"
	}
	place := fmt.Sprintf("exchange '%s' in vhost '", exchange)
	topic := fmt.Sprintf("topic '%s' in %s", m.routingKey, place)
	switch {
	case !c.isRefusal():
		return 0
	case strings.Contains(c.closeErr.Reason, "access to "+topic):
		return denied
	case strings.Contains(c.closeErr.Reason, "no "+place), strings.Contains(c.closeErr.Reason, "access to "+place):
		return missing
	}
	return 0
}
