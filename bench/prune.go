package main

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/txbox/txbox/inbox"
	"github.com/txbox/txbox/outbox"
)

const (
	pruneRows   = 10_000_000 // half of them to be deleted
	pruneWindow = 30 * time.Second
)

// prune: records are deleted while others are made; held against the rate without.
func prune(ctx context.Context, b *bench) ([]Result, error) {
	p, err := newPlace(ctx, b.databaseURL, b.amqpURL, "prune")
	if err != nil {
		return nil, err
	}
	defer p.close(ctx)
	if _, err := p.db.Exec(ctx, "CREATE TABLE "+p.table("effects")+" (message_id text NOT NULL, n integer)"); err != nil {
		return nil, err
	}
	// IDs as the outbox makes them, UUIDs of version 7, of a message a time over 30 days.
	_, err = p.db.Exec(ctx, `INSERT INTO `+p.table("inbox")+` (consumer, message_id, received_at, digest)
		SELECT 'bench', (left(lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7' || substr(md5(n::text), 2), 32))::uuid::text, at, n
		FROM generate_series(1, $1::int) AS n, LATERAL (SELECT now() - interval '30 days' * (1 - n::float8 / $1::int)) AS time(at)`, pruneRows)
	if err != nil {
		return nil, err
	}
	if _, err := p.db.Exec(ctx, "VACUUM ANALYZE "+p.table("inbox")); err != nil {
		return nil, err
	}
	b.say("prune: %d records are there", pruneRows)
	before, err := p.recorded(ctx, pruneWindow)
	if err != nil {
		return nil, err
	}
	longest := &transactions{}
	pruned, stop, err := p.pruning(ctx, longest)
	if err != nil {
		return nil, err
	}
	during, err := p.recorded(ctx, 2*pruneWindow)
	if err := errors.Join(err, stop()); err != nil {
		return nil, err
	}
	after, err := p.recorded(ctx, pruneWindow)
	if err != nil {
		return nil, err
	}
	b.say("prune: %.0f/s before, %.0f/s during, %.0f/s after; %d records deleted in %s", before, during, after, pruned.Load(), 2*pruneWindow)
	limit := (before + after) / 2
	return []Result{
		sideBySide("rate", "msg/s", 0.90, []Round{{Value: during, Limit: limit, Ratio: during / limit}}),
		atMost("longest_tx_ms", "ms", 100, float64(longest.max.Load())/1e6),
	}, nil
}

// pruning prunes until it is stopped.
func (p *place) pruning(ctx context.Context, longest *transactions) (pruned *atomic.Int64, stop func() error, err error) {
	cfg, err := pgxpool.ParseConfig(p.dbURL)
	if err != nil {
		return nil, nil, err
	}
	cfg.ConnConfig.Tracer = longest
	db, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	pruned = &atomic.Int64{}
	done := make(chan error, 1)
	go func() {
		n, err := inbox.Recorder{Schema: p.schema}.Prune(ctx, db, 15*24*time.Hour)
		pruned.Store(n)
		done <- err
	}()
	return pruned, func() error {
		cancel()
		err := <-done
		db.Close()
		if errors.Is(err, context.Canceled) {
			err = nil
		}
		return err
	}, nil
}

// recorded returns how many messages a second are recorded, each with an effect.
func (p *place) recorded(ctx context.Context, window time.Duration) (float64, error) {
	db, err := p.pool(ctx)
	if err != nil {
		return 0, err
	}
	defer db.Close()
	effect := p.effectSQL()
	began := time.Now()
	var n atomic.Int64
	var workers sync.WaitGroup
	failed := make(chan error, inboxWorkers)
	for range inboxWorkers {
		workers.Go(func() {
			for time.Since(began) < window {
				id := outbox.NewID().String()
				_, err := inbox.Recorder{Schema: p.schema}.Handle(ctx, db, "bench", id, func(ctx context.Context, tx pgx.Tx) error {
					_, err := tx.Exec(ctx, effect, id)
					return err
				})
				if err != nil {
					failed <- err
					return
				}
				n.Add(1)
			}
		})
	}
	workers.Wait()
	select {
	case err := <-failed:
		return 0, err
	default:
		return float64(n.Load()) / time.Since(began).Seconds(), nil
	}
}

// transactions notes the longest from BEGIN to the answer to COMMIT, of one at a time.
type transactions struct {
	began atomic.Int64
	max   atomic.Int64 // ns
}

func (t *transactions) TraceQueryStart(ctx context.Context, _ *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	if len(data.SQL) >= 5 && data.SQL[:5] == "begin" {
		t.began.Store(time.Now().UnixNano())
	}
	return context.WithValue(ctx, commitKey{}, data.SQL == "commit")
}

type commitKey struct{}

func (t *transactions) TraceQueryEnd(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryEndData) {
	if commit, _ := ctx.Value(commitKey{}).(bool); commit {
		if took := time.Now().UnixNano() - t.began.Load(); took > t.max.Load() {
			t.max.Store(took)
		}
	}
}
