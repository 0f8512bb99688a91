package relay

import (
	"fmt"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

const (
	// sweepFirst and sweepMost bound how often answers are looked for behind a
	// message that has none yet.
	sweepFirst = 2 * time.Millisecond
	sweepMost  = 50 * time.Millisecond
	// silentAfter is how long a message may be without an answer while others, sent
	// after it, get theirs; doubtFor is how long it has then still, since answers are
	// read by several goroutines, and sentApart is by how much later what went
	// through other channels must have been sent.
	silentAfter = 1500 * time.Millisecond
	doubtFor    = 500 * time.Millisecond
	sentApart   = 100 * time.Millisecond
	// alertFor is how long after such an end a channel on which nobody is answered for
	// silentAfter and doubtFor counts as another: one that waits for a silent queue is so.
	alertFor = time.Minute
)

// collectAhead is how many unanswered messages are passed when nothing says that
// answers come out of order.
const collectAhead = 32

// collect turns the broker's answers into verdicts. They come in any order, most of
// them in that of sending: it looks at the oldest messages and now and then, after
// a while without, at all.
func (c *channel) collect(all bool) {
	var acked []*message
	now := since()
	before := len(c.pending)
	kept, rest := c.pending[:0], before
	for i, f := range c.pending {
		if !all && len(kept) == collectAhead {
			rest = i
			break
		}
		if !isClosed(f.confirm.Done()) {
			kept = append(kept, f)
			continue
		}
		if !f.confirm.Acked() && (c.ch.IsClosed() || c.conn.IsClosed()) {
			c.undecided = append(c.undecided, f.message) // a closed channel answers like a nack
			continue
		}
		c.answered(f.sentAt)
		if now-f.sentAt > int64(silentAfter) {
			_, open := c.alarmedSince()
			c.relay.slow.answered(f.destination, time.Duration(now-max(f.sentAt, open)))
		}
		c.answeredTag = max(c.answeredTag, f.confirm.DeliveryTag)
		if f.confirm.Acked() {
			acked = append(acked, f.message)
		} else {
			c.relay.refuse(f.message, nacked, "nacked by the broker")
		}
	}
	kept = append(kept, c.pending[rest:]...)
	clear(c.pending[len(kept):])
	c.pending = kept
	c.confirmed(acked)
	if len(kept) < before {
		c.sweep = sweepFirst
	} else {
		c.sweep = min(2*c.sweep, sweepMost)
	}
}

// doubt gives the connection up if the oldest message has had no answer for too long.
func (c *channel) doubt() {
	if len(c.pending) == 0 {
		return
	}
	oldest := c.pending[0]
	tag := oldest.confirm.DeliveryTag
	if tag != c.doubted && c.overtaken(oldest) {
		c.doubted, c.doubtedAt = tag, since()
	}
	if tag == c.doubted && since()-c.doubtedAt > int64(doubtFor) {
		c.alert.Store(true)
		c.giveUp(oldest, fmt.Errorf("no answer to some messages within %s, while others had theirs", silentAfter))
	} else if limit := c.limit(oldest); c.unanswered(oldest, limit) {
		c.alert.Store(limit == c.relay.pub.cfg.ConfirmTimeout) // an alert does not prolong itself
		c.giveUp(oldest, fmt.Errorf("no answer from the broker within %s", limit))
	}
}

// confirmed tells those that were returned from those that the broker has. The
// client delivers a return before it resolves the confirm, so it is here by now.
func (c *channel) confirmed(acked []*message) {
	for len(c.returns) > 0 {
		if ret, ok := <-c.returns; ok {
			key := returnKey{ret.MessageId, destination{ret.Exchange, ret.RoutingKey}}
			c.returned[key] = append(c.returned[key], ret)
		}
	}
	if len(c.returned) > 0 {
		kept := acked[:0]
		for _, m := range acked {
			if ret, ok := c.takeReturn(m); ok {
				c.relay.refuse(m, returned, fmt.Sprintf("returned by the broker: %d %s", ret.ReplyCode, ret.ReplyText))
			} else {
				kept = append(kept, m)
			}
		}
		acked = kept
	}
	if len(acked) > 0 {
		c.relay.confirmed(acked)
	}
}

func (c *channel) takeReturn(m *message) (amqp.Return, bool) {
	key := returnKey{m.messageID.String(), m.destination}
	all := c.returned[key]
	if len(all) == 0 {
		return amqp.Return{}, false
	}
	if c.returned[key] = all[1:]; len(all) == 1 {
		delete(c.returned, key)
	}
	return all[0], true
}

// limit is how long a message may be without an answer.
func (c *channel) limit(f flight) time.Duration {
	limit := c.relay.pub.cfg.ConfirmTimeout
	if f.patience > 0 {
		limit = min(limit, max(f.patience, c.relay.slow.patience(f.destination)))
	}
	at := c.relay.stalledAt.Load()
	switch alert := at != 0 && since()-at < int64(alertFor); {
	case c.prober:
	case c.isolated: // what is slow has its time as a suspect
		limit = min(limit, silentAfter+doubtFor)
	case alert:
		limit = min(limit, max(silentAfter, c.relay.slow.patience(f.destination))+doubtFor)
	}
	return limit
}

// unanswered says that a message has had no answer for so long, while the broker took
// messages.
func (c *channel) unanswered(f flight, limit time.Duration) bool {
	alarmed, open := c.alarmedSince()
	return !alarmed && since()-max(f.sentAt, open) > int64(limit)
}

// overtaken says that a message has had no answer for a while, and others that
// were sent after it have.
func (c *channel) overtaken(f flight) bool {
	return !c.prober && c.unanswered(f, max(silentAfter, c.relay.slow.patience(f.destination))) &&
		(c.answeredTag > f.confirm.DeliveryTag || c.lastAnswered.Load() > f.sentAt+int64(sentApart))
}

// giveUp ends the connection: the broker reads nothing more from it while one of its
// channels waits for a queue. Which queue that is nothing tells: each destination
// that was in flight stands trial. A prober knows.
func (c *channel) giveUp(f flight, why error) {
	if c.prober {
		c.overdue = f.message
	} else {
		c.stalled.Store(true)
		c.relay.slow.answered(f.destination, time.Duration(since()-f.sentAt)) // if it answers after all, and is not silent
	}
	c.fail(why)
	c.conn.Cut()
}
