package relay

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/txbox/txbox/internal/dbschema"
)

// ErrSchema is returned by Run when the tables were migrated by a newer program
// and no longer serve this one.
var ErrSchema = dbschema.ErrIncompatible

// Relay publishes the messages of one outbox. Any number of relays may run
// against one database; they share its lanes.
type Relay struct {
	db        *pgxpool.Pool
	pub       *rabbitMQ
	cfg       Config
	hand      *hand
	leases    *leases
	reader    *reader
	settler   *settler
	suspects  *suspects
	slow      *slow
	refusals  refusals
	isolation isolation
	counts    counts
	running   atomic.Bool
	connected atomic.Bool  // to the broker, at some time
	upSince   atomic.Int64 // when the common connection was made, by our monotonic clock; 0: there is none
	stalledAt atomic.Int64 // when an alert began, since a connection was given up for want of answers, or a destination answers that did not; 0: never

	// What can keep the relay from its work.
	schema, leasing, reading, settling, broker, alarm condition
	locks                                             condition // keeps it from a few messages
}

// New returns a relay that reads from db and publishes through pub. The error
// names every problem with its arguments. The relay uses at most 3 connections of
// db at once; if others leave it none for as long as its lease, it loses its lanes. It
// does not close db.
func New(db *pgxpool.Pool, pub Publisher, cfg Config) (*Relay, error) {
	cfg, err := cfg.withDefaults(db, pub)
	if err != nil {
		return nil, fmt.Errorf("relay: %w", err)
	}
	cfg.Logger = cfg.Logger.With("relay", cfg.Name, "schema", cfg.Schema)
	r := &Relay{db: db, pub: pub.rabbitMQ(), cfg: cfg, hand: newHand()}
	r.suspects, r.slow, r.isolation.some = newSuspects(), newSlow(), make(chan struct{}, 1)
	r.refusals.log, r.refusals.destinations = cfg.Logger, make(map[destination]*refusal)
	for c, what := range map[*condition]string{
		&r.schema: "database", &r.leasing: "lease of lanes", &r.reading: "reading the outbox",
		&r.settling: "writing to the outbox", &r.locks: "settling of locked rows", &r.broker: "broker", &r.alarm: "publishing",
	} {
		c.what, c.log = what, cfg.Logger
	}
	for _, c := range []*condition{&r.schema, &r.leasing, &r.broker} {
		c.err = errNotStarted
	}
	sql := newStatements(cfg.Schema)
	r.leases = newLeases(db, sql, cfg, r.hand, &r.leasing)
	r.leases.useless = func() bool { return !r.connected.Load() || r.broker.failsFor() > cfg.Lease }
	r.reader = &reader{
		db: db, sql: sql, hand: r.hand, leases: r.leases, suspects: r.suspects, idle: cfg.IdleInterval,
		wake: make(chan struct{}, 1), health: &r.reading,
	}
	r.settler = &settler{
		db: db, sql: sql, hand: r.hand, leases: r.leases, retryFor: cfg.RetryFor, health: &r.settling,
		locked: locked{told: &r.locks}, dead: r.refusals.dead,
	}
	return r, nil
}

// Wake makes the relay look at the outbox at once. Call it after a commit in the
// same process to save half an IdleInterval; it never blocks.
func (r *Relay) Wake() { notify(r.reader.wake) }

// Run publishes until ctx ends; it returns nil after a clean stop. Outages of
// database and broker are waited out. While ctx lasts, ErrSchema, at the start, is the only
// error. A Relay runs once.
//
// When ctx ends, Run reads nothing more, awaits the broker's answers to what is
// in flight, records them and frees its lanes, all within Config.StopTimeout.
// What is left then is published again by whoever owns its lane next, and Run
// returns an error.
func (r *Relay) Run(ctx context.Context) error {
	if r.running.Swap(true) {
		return errors.New("relay: Run was called twice")
	}
	r.cfg.Logger.Info("relay: runs")
	err := r.run(ctx)
	if err == nil {
		r.cfg.Logger.Info("relay: has stopped")
	}
	return err
}

func (r *Relay) run(ctx context.Context) error {
	if err := r.awaitSchema(ctx); err != nil || ctx.Err() != nil {
		return err
	}
	// hard ends when a clean stop has taken too long.
	hard, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()

	var reading, publishing, settling, leasing sync.WaitGroup
	leaseCtx, stopLeasing := context.WithCancel(hard)
	defer stopLeasing()
	stopSettling := make(chan struct{})
	leasing.Go(func() { r.leases.run(leaseCtx, hard) })
	settling.Go(func() { r.settler.run(hard, stopSettling) })
	publishing.Go(func() { r.publishLoop(ctx, hard) })
	for range isolators {
		publishing.Go(func() { r.isolate(ctx, hard) })
	}
	for i := range probers {
		publishing.Go(func() { r.probe(ctx, hard, i < probers/2) })
	}
	reading.Go(func() { r.reader.run(ctx) })
	reading.Go(func() { r.refusals.watch(ctx) })

	<-ctx.Done()
	timer := time.AfterFunc(r.cfg.StopTimeout, cancel)
	defer timer.Stop()
	reading.Wait()    // nothing more comes into the hand
	publishing.Wait() // everything in flight has its answer
	r.unknownAll(r.isolation.clear())
	close(stopSettling)
	settling.Wait() // the tables say so
	stopLeasing()
	leasing.Wait() // nobody renews any more
	err := r.leases.leave(hard)
	if hard.Err() != nil {
		return fmt.Errorf("relay: not stopped cleanly within %s", r.cfg.StopTimeout)
	}
	if err != nil {
		return fmt.Errorf("relay: stopped, but lanes stay leased until the lease ends: %w", err)
	}
	return nil
}

// awaitSchema returns nil when the tables are there, or when ctx has ended.
func (r *Relay) awaitSchema(ctx context.Context) error {
	wait := newBackOff()
	for {
		check, cancel := context.WithTimeout(ctx, readTimeout)
		err := dbschema.CheckVersion(check, r.db, r.cfg.Schema)
		if err == nil {
			err = dbschema.CheckSession(check, r.db)
		}
		cancel()
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, ErrSchema) {
			return fmt.Errorf("relay: %w", err)
		}
		r.schema.set(err)
		if err == nil {
			return nil
		}
		if pause(ctx, wait.NextBackOff()) != nil {
			return nil
		}
	}
}

// publishLoop keeps a connection to the broker until ctx ends.
func (r *Relay) publishLoop(ctx, hard context.Context) {
	wait := newBackOff()
	for ctx.Err() == nil {
		conn, err := r.pub.connect(ctx)
		if err == nil {
			r.broker.set(nil)
			r.connected.Store(true)
			notify(r.leases.wake)
			connected := time.Now()
			r.upSince.Store(since())
			err = r.publish(ctx, hard, conn)
			r.upSince.Store(0)
			if time.Since(connected) > maxReconnect {
				wait.Reset()
			}
		}
		if ctx.Err() != nil {
			return
		}
		r.broker.set(err)
		if pause(ctx, wait.NextBackOff()) != nil {
			return
		}
	}
}
