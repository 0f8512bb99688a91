package inbox_test

import (
	"bytes"
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/txbox/txbox/inbox"
	"github.com/txbox/txbox/internal/testenv"
)

// newDatabase returns a proxy of the database whose clients send statements as text.
func (b *broker) newDatabase(t *testing.T) *proxy {
	return newProxy(t, withParam(t, withParam(t, b.URL, "sslmode", "disable"), "default_query_exec_mode", "exec"))
}

// executes reports whether what a client sends executes a statement with this in it, and does
// not only ask for the types of its arguments.
func executes(sent []byte, sql string) bool {
	const execute = "E\x00\x00\x00\x09" // the message of that name, with its length
	return bytes.Contains(sent, []byte(sql)) && bytes.Contains(sent, []byte(execute))
}

// The database says nothing for longer than a handler may take.
func TestASilentDatabaseSpendsNoAttempt(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	database := b.newDatabase(t)
	cfg := b.config(t)
	cfg.Timeout, cfg.MaxAttempts = 100*time.Millisecond, 1
	speaks, timedOut := make(chan struct{}), make(chan struct{})
	var silent atomic.Bool
	database.onWrite = func([]byte) (cut, swallow bool) {
		if silent.Load() {
			<-speaks
		}
		return false, false
	}
	c := b.run(t, b.pool(t, database.url), testenv.AMQPURL(t), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if silent.CompareAndSwap(false, true) {
			defer close(timedOut)
		}
		return b.apply(ctx, tx, m)
	}, cfg)
	b.publish(t, numbered(1)...)
	<-timedOut
	time.AfterFunc(1500*time.Millisecond, func() { close(speaks) }) // longer than is waited to know that it is silent
	c.waitFor(t, "settled", func(s inbox.Stats) bool { return s.Applied+s.Parked["dead"] == 1 })
	c.stop()
	if s := c.Stats(); s.Failures != 0 || s.Applied != 1 {
		t.Errorf("%+v", s)
	}
}

// The server's disk is full, or it has become one that takes no writes.
func TestAServerThatCannotWorkSpendsNoAttempt(t *testing.T) {
	t.Parallel()
	for _, code := range []string{"53100", "25006"} {
		t.Run(code, func(t *testing.T) {
			t.Parallel()
			b := setupBroker(t)
			cfg := b.config(t)
			cfg.MaxAttempts = 1
			var runs atomic.Int64
			c := b.run(t, b.Pool, testenv.AMQPURL(t), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
				if m.Attempt != 1 {
					t.Errorf("attempt %d", m.Attempt)
				}
				if runs.Add(1) < 12 { // the message is parked meanwhile
					_, err := tx.Exec(ctx, "DO $$ BEGIN RAISE SQLSTATE '"+code+"'; END $$")
					return err
				}
				return b.apply(ctx, tx, m)
			}, cfg)
			b.publish(t, numbered(1)...)
			c.waitFor(t, "settled", func(s inbox.Stats) bool { return s.Applied+s.Parked["dead"] == 1 })
			c.stop()
			if s := c.Stats(); s.Applied != 1 {
				t.Errorf("%+v", s)
			}
		})
	}
}

// One message always asks for more than the server has, as if it were an outage.
func TestWhatLooksLikeAnOutageCostsItsBatchOnce(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	var calls atomic.Int64 // of the last before the culprit
	c := b.inOneBatch(t, b.Pool, b.config(t), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		switch m.ID {
		case "8":
			calls.Add(1)
		case "9":
			inbox.Pipeline(tx).Queue("DO $$ BEGIN RAISE SQLSTATE '53200'; END $$")
			return nil
		}
		return b.apply(ctx, tx, m)
	}, numbered(10)...)
	c.waitFor(t, "settled", func(s inbox.Stats) bool { return s.Applied == 10 && s.Parked["retry"] > 0 })
	c.stop()
	if calls.Load() > 11 { // ten in vain
		t.Errorf("%d calls", calls.Load())
	}
	if n := b.count(t, "inbox_parked", "attempts = 0"); n != 1 {
		t.Errorf("%d parked without an attempt", n)
	}
}

// A limit of the client's own is no outage: else the message would hold up its key for ever.
func TestAStatementOverTheClientsLimitsSpendsItsAttempts(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	cfg := b.config(t)
	cfg.MaxAttempts = 1
	c := b.run(t, b.Pool, testenv.AMQPURL(t), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		_, err := tx.Exec(ctx, "DO $$ BEGIN RAISE SQLSTATE '53400'; END $$")
		return err
	}, cfg)
	b.publish(t, numbered(1)...)
	c.waitFor(t, "dead", func(s inbox.Stats) bool { return s.Parked["dead"] == 1 })
	c.stop()
}

// The connection is lost while a parked message is claimed: the attempt may have been counted.
func TestALostClaimSpendsNoAttemptAndNoTime(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	database := b.newDatabase(t)
	var claims atomic.Int64
	database.onWrite = func(sent []byte) (cut, swallow bool) {
		return false, executes(sent, "SET attempts = attempts + 1") && claims.Add(1) == 1
	}
	cfg := b.config(t)
	cfg.MaxAttempts = 2
	c := b.run(t, b.pool(t, database.url), testenv.AMQPURL(t), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if m.Attempt == 1 {
			return errTest
		}
		return b.apply(ctx, tx, m)
	}, cfg)
	b.publish(t, numbered(1)...)
	c.waitFor(t, "applied", func(s inbox.Stats) bool { return s.Applied == 1 }) // a claim lasts longer than that
	c.stop()
	if s := c.Stats(); s.Failures != 1 || claims.Load() < 2 {
		t.Errorf("%d claims, %+v", claims.Load(), s)
	}
}
