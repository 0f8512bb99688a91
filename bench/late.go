package main

import (
	"context"
	"errors"
	"time"

	"github.com/txbox/txbox/outbox"
)

// late: a transaction writes a message, stays open for a minute of others' load, and
// commits; how long until a consumer has the message.
func late(ctx context.Context, b *bench) ([]Result, error) {
	p, err := newPlace(ctx, b.databaseURL, b.amqpURL, "late")
	if err != nil {
		return nil, err
	}
	defer p.close(ctx)
	key, err := p.fresh(ctx, "late")
	if err != nil {
		return nil, err
	}
	others, err := p.fresh(ctx, "others")
	if err != nil {
		return nil, err
	}
	deliveries, err := p.ch.Consume(key, "", true, false, false, false, nil)
	if err != nil {
		return nil, err
	}
	tx, err := p.db.Begin(ctx)
	if err != nil {
		return nil, err
	}
	defer tx.Rollback(context.WithoutCancel(ctx))
	w := outbox.Writer{Schema: p.schema}
	if err := w.Write(ctx, tx, outbox.Message{Exchange: p.exchange, RoutingKey: key}); err != nil {
		return nil, err
	}
	r, err := p.relay(ctx)
	if err != nil {
		return nil, err
	}
	const open = time.Minute
	written := 0
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for began := time.Now(); time.Since(began) < open; <-tick.C {
		if err := p.fill(ctx, 200, 100, others); err != nil {
			return nil, errors.Join(err, r.end())
		}
		written += 200
	}
	undisturbed := r.Stats().Published >= int64(written-1000)
	if err := tx.Commit(ctx); err != nil {
		return nil, errors.Join(err, r.end())
	}
	committed := time.Now()
	select {
	case <-deliveries:
	case <-time.After(time.Minute):
		return nil, errors.Join(errors.New("the late message did not come within a minute"), r.end())
	}
	result := atMost("seconds", "s", 1, time.Since(committed).Seconds())
	if !undisturbed {
		result.Met = false
		b.say("late: only %d of %d others were published", r.Stats().Published, written)
	}
	return []Result{result}, r.end()
}
