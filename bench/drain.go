package main

import (
	"context"
	"time"
)

// drain: waiting messages, keyed, to confirmed and deleted.
func drain(ctx context.Context, b *bench) ([]Result, error) {
	p, err := newPlace(ctx, b.databaseURL, b.amqpURL, "drain")
	if err != nil {
		return nil, err
	}
	defer p.close(ctx)
	const n, keys = 200_000, 10_000
	var rounds []Round
	for range b.rounds {
		before := readCPU()
		ours, err := p.drainOnce(ctx, n, keys, &before)
		if err != nil {
			return nil, err
		}
		b.say("ours %.0f/s; %s", ours, readCPU().since(before, n))
		key, err := p.fresh(ctx, "limit")
		if err != nil {
			return nil, err
		}
		before = readCPU()
		limit, err := bare(b.amqpURL, p.exchange, key, n, keys, bareChannels, bareWindow)
		if err != nil {
			return nil, err
		}
		b.say("limit %.0f/s; %s", limit, readCPU().since(before, n))
		rounds = append(rounds, Round{Value: ours, Limit: limit, Ratio: ours / limit})
	}
	return []Result{sideBySide("rate", "msg/s", 0.90, rounds)}, nil
}

// The best of those tried: 1 to 8 channels with 64 to 4,000 in flight on each.
const (
	bareChannels = 8
	bareWindow   = 125
)

// drainOnce returns messages per second, and the processor time when it began to
// count.
func (p *place) drainOnce(ctx context.Context, n, keys int, before *cpuTime) (float64, error) {
	key, err := p.fresh(ctx, "ours")
	if err != nil {
		return 0, err
	}
	if err := p.fill(ctx, n, keys, key); err != nil {
		return 0, err
	}
	*before = readCPU()
	began := time.Now()
	r, err := p.relay(ctx)
	if err != nil {
		return 0, err
	}
	err = p.drained(ctx, r, int64(n))
	took := time.Since(began)
	if err := r.end(); err != nil {
		return 0, err
	}
	return float64(n) / took.Seconds(), err
}
