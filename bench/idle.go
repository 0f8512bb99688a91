package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
)

// counter counts the statements of a pool.
type counter struct{ n atomic.Int64 }

func (c *counter) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	c.n.Add(1)
	return ctx
}
func (c *counter) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}
func (c *counter) TraceBatchStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceBatchStartData) context.Context {
	return ctx
}
func (c *counter) TraceBatchQuery(context.Context, *pgx.Conn, pgx.TraceBatchQueryData) { c.n.Add(1) }
func (c *counter) TraceBatchEnd(context.Context, *pgx.Conn, pgx.TraceBatchEndData)     {}

// idle: no messages for a minute.
func idle(ctx context.Context, b *bench) ([]Result, error) {
	p, err := newPlace(ctx, b.databaseURL, b.amqpURL, "idle")
	if err != nil {
		return nil, err
	}
	defer p.close(ctx)
	p.tracer = &counter{}
	r, err := p.relay(ctx)
	if err != nil {
		return nil, err
	}
	if err := until(ctx, time.Minute, "the relay is ready", func() (bool, error) { return r.Ready() == nil, nil }); err != nil {
		return nil, errors.Join(err, r.end())
	}
	const quiet = time.Minute
	before, statements, began := selfCPU(), p.tracer.n.Load(), time.Now()
	select {
	case <-time.After(quiet):
	case <-ctx.Done():
	}
	took := time.Since(began).Seconds()
	cpu := (selfCPU() - before).Seconds() / took * 100
	rate := float64(p.tracer.n.Load()-statements) / took
	if err := r.end(); err != nil {
		return nil, err
	}
	least, err := p.select1(ctx, quiet/2)
	result := atMost("cpu_percent", "%", 1, cpu)
	result.Peers = map[string]float64{"SELECT 1 each 50 ms": least}
	return []Result{result, atMost("statements_per_s", "1/s", 25, rate)}, err
}

// select1 returns what the least that polls a database takes of a core, in percent.
func (p *place) select1(ctx context.Context, limit time.Duration) (float64, error) {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	before, began := selfCPU(), time.Now()
	for time.Since(began) < limit {
		<-tick.C
		if _, err := p.db.Exec(ctx, "SELECT 1"); err != nil {
			return 0, err
		}
	}
	return (selfCPU() - before).Seconds() / time.Since(began).Seconds() * 100, nil
}

// takeover: the owner of lanes stops, or is killed; how long until what is written
// into all lanes then has been published.
func takeover(ctx context.Context, b *bench) ([]Result, error) {
	const lease = 15.0
	clean, err := takeoverOnce(ctx, b, func(p *place) (func() error, error) {
		r, err := p.relay(ctx)
		if err != nil {
			return nil, err
		}
		return r.end, nil
	})
	if err != nil {
		return nil, err
	}
	killed, err := takeoverOnce(ctx, b, func(p *place) (func() error, error) {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childVariable+"="+p.schema)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			return nil, err
		}
		return func() error {
			err := cmd.Process.Kill()
			cmd.Wait() // it was killed
			return err
		}, nil
	})
	if err != nil {
		return nil, err
	}
	return []Result{atMost("clean_s", "s", 0.5, clean), atMost("killed_s", "s", lease+2, killed)}, nil
}

// childVariable makes this program a relay of the schema that it names.
const childVariable = "TXBOX_BENCH_RELAY"

func takeoverOnce(ctx context.Context, b *bench, owner func(*place) (end func() error, err error)) (float64, error) {
	p, err := newPlace(ctx, b.databaseURL, b.amqpURL, "takeover")
	if err != nil {
		return 0, err
	}
	defer p.close(ctx)
	key, err := p.fresh(ctx, "q")
	if err != nil {
		return 0, err
	}
	end, err := owner(p)
	if err != nil {
		return 0, err
	}
	owns := func(owners int) func() (bool, error) {
		return func() (bool, error) {
			var lanes, by int
			err := p.db.QueryRow(ctx, "SELECT count(owner), count(DISTINCT owner) FROM "+p.table("outbox_lane")).Scan(&lanes, &by)
			return lanes == 64 && by == owners, err
		}
	}
	if err := until(ctx, time.Minute, "the owner has all lanes", owns(1)); err != nil {
		return 0, errors.Join(err, end())
	}
	next, err := p.relay(ctx)
	if err != nil {
		return 0, errors.Join(err, end())
	}
	if err := until(ctx, time.Minute, "both have lanes", owns(2)); err != nil {
		return 0, errors.Join(err, end(), next.end())
	}
	if err := end(); err != nil {
		return 0, errors.Join(err, next.end())
	}
	began := time.Now()
	if err := p.fill(ctx, 2000, 0, key); err != nil {
		return 0, errors.Join(err, next.end())
	}
	err = until(ctx, time.Minute, "all lanes flow", func() (bool, error) {
		var left int
		err := p.db.QueryRow(ctx, "SELECT count(*) FROM "+p.table("outbox")).Scan(&left)
		return left == 0, err
	})
	return time.Since(began).Seconds(), errors.Join(err, next.end())
}

// runChild is a relay and nothing else, until it is killed.
func runChild(ctx context.Context, schema string) error {
	p := &place{dbURL: os.Getenv("DATABASE_URL"), amqpURL: os.Getenv("AMQP_URL"), schema: schema}
	r, err := p.relay(ctx)
	if err != nil {
		return err
	}
	return fmt.Errorf("relay ended: %w", <-r.done)
}
