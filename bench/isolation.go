package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/txbox/txbox/internal/servers"
)

// silent: one quorum queue of ten stops confirming, with 5 % of the traffic; the
// others' rate against that of a run in which none does.
func silent(ctx context.Context, b *bench) ([]Result, error) {
	p, err := newPlace(ctx, b.databaseURL, b.amqpURL, "silent")
	if err != nil {
		return nil, err
	}
	defer p.close(ctx)
	broker := &servers.RabbitMQ{Dir: b.brokerDir}
	eval := func(function string) error {
		_, err := broker.Ctl(ctx, "eval", fmt.Sprintf("sys:%s('%%2F_%s_0').", function, p.exchange))
		return err
	}
	const n, queues = 400_000, 10
	run := func(suspend bool) (rate float64, err error) {
		if _, err := p.fresh(ctx, "0"); err != nil {
			return 0, err
		}
		for i := 1; i < queues; i++ {
			if err := p.queue(fmt.Sprint(i)); err != nil {
				return 0, err
			}
		}
		if _, err := p.db.Exec(ctx, `INSERT INTO `+p.table("outbox")+` (message_id, key, exchange, routing_key, headers, payload)
			SELECT gen_random_uuid(), 'key-' || (n % 10000), $2, $2 || '_' || CASE WHEN n % 20 = 0 THEN 0 ELSE 1 + n % 9 END,
				jsonb_build_object('traceparent', $3::text), $4::bytea
			FROM generate_series(1, $1::int) AS n`, n, p.exchange, traceparent, payload(payloadBytes)); err != nil {
			return 0, err
		}
		if suspend {
			if err := eval("suspend"); err != nil {
				return 0, err
			}
			defer func() { err = errors.Join(err, eval("resume")) }()
		}
		if suspend {
			return p.othersRate(ctx, n-n/20, "")
		}
		return p.othersRate(ctx, n-n/20, p.exchange+"_0")
	}
	return b.againstClean("silent", 0.85, run)
}

// blocked: a key with a dead head and 100,000 followers, among others.
func blocked(ctx context.Context, b *bench) ([]Result, error) {
	p, err := newPlace(ctx, b.databaseURL, b.amqpURL, "blocked")
	if err != nil {
		return nil, err
	}
	defer p.close(ctx)
	const others, followers = 300_000, 100_000
	run := func(block bool) (float64, error) {
		key, err := p.fresh(ctx, "others")
		if err != nil {
			return 0, err
		}
		if block {
			if _, err := p.db.Exec(ctx, `INSERT INTO `+p.table("outbox_parked")+` (message_id, key, routing_key, reason)
				VALUES (gen_random_uuid(), 'blocked', $1, 'dead')`, key); err != nil {
				return 0, err
			}
		}
		if _, err := p.db.Exec(ctx, `INSERT INTO `+p.table("outbox")+` (message_id, key, exchange, routing_key, headers, payload)
			SELECT gen_random_uuid(), CASE WHEN f THEN 'blocked' ELSE 'key-' || (n % 10000) END, $2, $3,
				jsonb_build_object('traceparent', $4::text), $5::bytea
			FROM generate_series(1, $1::int) AS n, LATERAL (SELECT $6 AND n % 4 = 0 AS f) AS x
			WHERE f OR n % 4 <> 0`, others+followers, p.exchange, key, traceparent, payload(payloadBytes), block); err != nil {
			return 0, err
		}
		return p.othersRate(ctx, others, "")
	}
	return b.againstClean("blocked", 0.90, run)
}

// othersRate runs a relay until it has published n messages beside those that are in
// one queue, if it is given.
func (p *place) othersRate(ctx context.Context, n int, except string) (float64, error) {
	began := time.Now()
	r, err := p.relay(ctx)
	if err != nil {
		return 0, err
	}
	err = until(ctx, 10*time.Minute, "the others are published", func() (bool, error) {
		published := r.Stats().Published
		if except == "" || published < int64(n) {
			return published >= int64(n), nil
		}
		q, err := p.ch.QueueDeclarePassive(except, true, false, false, false, nil)
		return published-int64(q.Messages) >= int64(n), err
	})
	rate := float64(n) / time.Since(began).Seconds()
	return rate, errors.Join(err, r.end())
}

// againstClean runs with and without the trouble in turn.
func (b *bench) againstClean(name string, target float64, run func(trouble bool) (float64, error)) ([]Result, error) {
	var rounds []Round
	for range b.rounds {
		rate, err := run(true)
		if err != nil {
			return nil, err
		}
		clean, err := run(false)
		if err != nil {
			return nil, err
		}
		b.say("%s: %.0f/s, clean %.0f/s", name, rate, clean)
		rounds = append(rounds, Round{Value: rate, Limit: clean, Ratio: rate / clean})
	}
	return []Result{sideBySide("rate", "msg/s", target, rounds)}, nil
}
