package main

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/internal/checker"
)

// tap notes what is on the wire.
type tap struct {
	site    *site
	checker *checker.Checker
	pos     int64
	latest  atomic.Int64 // when a message came, in Unix nanoseconds
	err     error        // of writing it down: nothing can be said then
}

const (
	tapBatch = 500
	tapDelay = 200 * time.Millisecond
)

// run follows the tap's queue until ctx ends. It lives through the broker's faults.
func (t *tap) run(ctx context.Context) {
	t.latest.Store(time.Now().UnixNano())
	for ctx.Err() == nil && t.err == nil {
		_ = t.site.withChannel(func(ch *amqp.Channel) error { return t.follow(ctx, ch) }) // the broker is gone for now
		time.Sleep(tapDelay)
	}
}

// follow acknowledges what is written down.
func (t *tap) follow(ctx context.Context, ch *amqp.Channel) error {
	if err := ch.Qos(2*tapBatch, 0, false); err != nil {
		return err
	}
	deliveries, err := ch.Consume(tapQueue, "", false, false, false, false, nil)
	if err != nil {
		return err
	}
	var seen []checker.Seen
	var last uint64
	tick := time.NewTicker(tapDelay)
	defer tick.Stop()
	for open := true; open; {
		var d amqp.Delivery
		select {
		case <-ctx.Done():
			open = false
		case <-tick.C:
		case d, open = <-deliveries:
			if open {
				seen, last = append(seen, see(d)), d.DeliveryTag
				t.latest.Store(time.Now().UnixNano())
			}
			if open && len(seen) < tapBatch {
				continue
			}
		}
		if len(seen) == 0 {
			continue
		}
		if t.err = t.checker.Wire(context.WithoutCancel(ctx), t.pos, seen); t.err != nil {
			return t.err
		}
		t.pos += int64(len(seen))
		seen = seen[:0]
		if err := ch.Ack(last, true); err != nil {
			return err
		}
	}
	return nil
}

// quiet returns for how long nothing has come.
func (t *tap) quiet() time.Duration { return time.Duration(time.Now().UnixNano() - t.latest.Load()) }

func see(d amqp.Delivery) checker.Seen {
	headers := make(map[string]string)
	if text, ok := d.Headers[checkHeader].(string); ok {
		headers[checkHeader] = text
	}
	b := parse(d.Body)
	id, _ := uuid.Parse(d.MessageId) // what has none is no message that was committed
	return checker.Seen{
		MessageID: id, Key: b.key(), Seq: b.Seq, Hash: hash(d.Body, d.Type, d.ContentType, headers), Redelivered: d.Redelivered,
	}
}
