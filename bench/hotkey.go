package main

import "context"

// hotkey: all messages have one key, so that each waits for the confirm of the one
// before.
func hotkey(ctx context.Context, b *bench) ([]Result, error) {
	p, err := newPlace(ctx, b.databaseURL, b.amqpURL, "hotkey")
	if err != nil {
		return nil, err
	}
	defer p.close(ctx)
	const n = 10_000
	var rounds []Round
	for range b.rounds {
		var before cpuTime
		ours, err := p.drainOnce(ctx, n, 1, &before)
		if err != nil {
			return nil, err
		}
		key, err := p.fresh(ctx, "limit")
		if err != nil {
			return nil, err
		}
		limit, err := bare(b.amqpURL, p.exchange, key, n, 1, 1, 1)
		if err != nil {
			return nil, err
		}
		b.say("hotkey: %.0f/s, limit %.0f/s", ours, limit)
		rounds = append(rounds, Round{Value: ours, Limit: limit, Ratio: ours / limit})
	}
	return []Result{sideBySide("rate", "msg/s", 0.90, rounds)}, nil
}
