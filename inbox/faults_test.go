package inbox_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/txbox/txbox/inbox"
	"github.com/txbox/txbox/internal/testenv"
)

func TestConsumerHasOneEffectPerMessageWhileItsBrokerConnectionIsCut(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	const n = 300
	b.publish(t, numbered(n)...)
	server := newProxy(t, testenv.AMQPURL(t))
	c := b.run(t, b.Pool, server.url, b.apply, b.config(t))
	for cut := uint64(1); cut <= 4; cut++ {
		c.waitFor(t, "more applied", func(s inbox.Stats) bool { return s.Applied >= cut*50 })
		server.cut()
		c.waitFor(t, "connected again", func(s inbox.Stats) bool { return s.Reconnects == cut })
	}
	c.waitFor(t, "all applied", func(s inbox.Stats) bool { return s.Applied == n })
	b.wantReady(t, 0)
	c.stop()
	b.wantReady(t, 0)
	b.wantOneEffectEach(t, n)
	if s := c.Stats(); s.Failures != 0 {
		t.Errorf("an outage cost attempts: %+v", s)
	}
}

func TestConsumerHasOneEffectPerMessageWhileItsDatabaseConnectionsAreCut(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	const n = 300
	b.publish(t, numbered(n)...)
	server := newProxy(t, withParam(t, b.URL, "sslmode", "disable"))
	c := b.run(t, b.pool(t, server.url), testenv.AMQPURL(t), b.apply, b.config(t))
	for cut := uint64(1); cut <= 10; cut++ {
		c.waitFor(t, "more applied", func(s inbox.Stats) bool { return s.Applied >= cut*25 })
		server.cut()
	}
	c.waitFor(t, "all applied", func(s inbox.Stats) bool { return s.Applied == n })
	c.stop()
	b.wantReady(t, 0)
	b.wantOneEffectEach(t, n)
	if s := c.Stats(); s.Failures != 0 {
		t.Errorf("an outage cost attempts: %+v", s)
	}
}

func TestConsumerHasOneEffectAfterACommitOfUnknownOutcome(t *testing.T) {
	t.Parallel()
	for _, reached := range []bool{false, true} {
		for _, attempt := range []int{1, 2} { // the first delivery, and a parked message
			t.Run(fmt.Sprintf("reached=%v attempt=%d", reached, attempt), func(t *testing.T) {
				t.Parallel()
				b := setupBroker(t)
				server := newProxy(t, withParam(t, b.URL, "sslmode", "disable"))
				var armed, broken atomic.Bool
				server.onWrite = func(sent []byte) (cut, swallow bool) {
					if !bytes.Contains(sent, []byte("commit\x00")) || !armed.CompareAndSwap(true, false) {
						return false, false
					}
					broken.Store(true)
					return !reached, reached
				}
				b.publish(t, numbered(1)...)
				c := b.run(t, b.pool(t, server.url), testenv.AMQPURL(t), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
					if m.Attempt < attempt {
						return errTest
					}
					armed.Store(!broken.Load())
					return b.apply(ctx, tx, m)
				}, b.config(t))
				c.waitFor(t, "applied", func(s inbox.Stats) bool { return s.Applied == 1 })
				b.wantReady(t, 0)
				c.stop()
				b.wantReady(t, 0)
				b.wantOneEffectEach(t, 1)
				if s := c.Stats(); !broken.Load() || s.Failures != uint64(attempt-1) || b.count(t, "inbox_parked", "true") != 0 {
					t.Errorf("broken %v, %+v", broken.Load(), s)
				}
			})
		}
	}
}

func TestConsumerKeepsMessagesWhileTheDatabaseIsAway(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	server := newProxy(t, withParam(t, b.URL, "sslmode", "disable"))
	var calls atomic.Int64
	c := b.run(t, b.pool(t, server.url), testenv.AMQPURL(t), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		calls.Add(1)
		return b.apply(ctx, tx, m)
	}, b.config(t))
	c.waitReady(t)
	server.setDown(true)
	b.publish(t, numbered(50)...)
	c.waitNotReady(t, "the database")
	c.stop()
	b.wantReady(t, 50)
	if calls.Load() != 0 {
		t.Errorf("%d calls", calls.Load())
	}
	c = b.run(t, b.pool(t, server.url), testenv.AMQPURL(t), b.apply, b.config(t))
	c.waitNotReady(t, "the database schema")
	server.setDown(false)
	c.waitFor(t, "all applied", func(s inbox.Stats) bool { return s.Applied == 50 })
	c.waitReady(t)
	b.wantOneEffectEach(t, 50)
}

func TestConsumerGoesOnWhenTheDatabaseIsBack(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	server := newProxy(t, withParam(t, b.URL, "sslmode", "disable"))
	inHandler, goOn := make(chan struct{}), make(chan struct{})
	c := b.run(t, b.pool(t, server.url), testenv.AMQPURL(t), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if m.ID == "0" {
			select {
			case inHandler <- struct{}{}:
				<-goOn
			case <-goOn: // not the first time
			}
		}
		return b.apply(ctx, tx, m)
	}, b.config(t))
	b.publish(t, numbered(1)...)
	<-inHandler
	server.setDown(true) // in the middle of a handler
	close(goOn)
	c.waitNotReady(t, "the database")
	b.publish(t, numbered(20)...)
	server.setDown(false)
	c.waitFor(t, "all applied", func(s inbox.Stats) bool { return s.Applied == 20 && s.Duplicates == 1 })
	c.waitReady(t)
	b.wantOneEffectEach(t, 20)
	if s := c.Stats(); s.Failures != 0 || s.Reconnects != 0 {
		t.Errorf("an outage cost attempts, or the connection to the broker: %+v", s)
	}
}

func TestConsumerWaitsForADeletedQueueAndGoesOn(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	c := b.start(t, b.apply)
	c.waitReady(t)
	if _, err := b.QueueDelete(b.queue, false, false, false); err != nil {
		t.Fatal(err)
	}
	c.waitNotReady(t, "the queue")
	b.declare(t)
	b.publish(t, numbered(1)...)
	c.waitFor(t, "applied", func(s inbox.Stats) bool { return s.Applied == 1 })
	c.waitReady(t)
}

func TestParkedMessagesAreHandledWhileTheBrokerIsAway(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	server := newProxy(t, testenv.AMQPURL(t))
	b.publish(t, numbered(1)...)
	c := b.run(t, b.Pool, server.url, func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if m.Attempt == 1 {
			return inbox.RetryAfter(0, errTest)
		}
		return b.apply(ctx, tx, m)
	}, b.config(t))
	c.waitFor(t, "parked", func(s inbox.Stats) bool { return s.Parked["retry"] == 1 })
	b.exec(t, "UPDATE "+b.Table("inbox_parked")+" SET attempts = 1")
	server.setDown(true)
	c.waitFor(t, "applied", func(s inbox.Stats) bool { return s.Applied == 1 && !s.Connected })
}

func TestConsumerWaitsForTheSchemaAndRefusesANewerOne(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	version := b.Table("txbox_version")
	b.exec(t, "UPDATE "+version+" SET version = 0")
	c := b.start(t, b.apply)
	c.waitNotReady(t, "the database schema")
	b.exec(t, "UPDATE "+version+" SET version = 1")
	c.waitReady(t)
	c.stop()
	b.exec(t, "UPDATE "+version+" SET version = 1000, compatible_since = 1000")
	if err := c.Run(b.ctx); !errors.Is(err, inbox.ErrSchema) {
		t.Errorf("got %v", err)
	}
}

func TestConflictsRunAgainWithoutSpendingAnAttempt(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	b.publish(t, numbered(2)...)
	var runs [2]atomic.Int64
	c := b.start(t, func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		i := m.ID[0] - '0'
		if runs[i].Add(1) < 4 || i == 1 && m.Attempt == 1 {
			_, err := tx.Exec(ctx, "DO $$ BEGIN RAISE SQLSTATE '40P01'; END $$")
			return err
		}
		return b.apply(ctx, tx, m)
	})
	c.waitFor(t, "all applied", func(s inbox.Stats) bool { return s.Applied == 2 })
	if s := c.Stats(); runs[0].Load() != 4 || runs[1].Load() != 11 || s.Failures != 1 {
		t.Errorf("%d and %d runs, %+v", runs[0].Load(), runs[1].Load(), s)
	}
	b.wantOneEffectEach(t, 2)
}

// A consumer elsewhere holds one ID in a transaction that does not end.
func TestOnlyTheMessageThatAnotherHoldsWaits(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	tx, err := b.Begin(b.ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(b.ctx)
	if first, err := b.Record(b.ctx, tx, consumer, "7"); !first || err != nil {
		t.Fatal(first, err)
	}
	const n = 50
	b.publish(t, numbered(n)...)
	c := b.start(t, b.apply)
	c.waitFor(t, "all others applied", func(s inbox.Stats) bool { return s.Applied == n-1 })
	if err := tx.Rollback(b.ctx); err != nil {
		t.Fatal(err)
	}
	c.waitFor(t, "all applied", func(s inbox.Stats) bool { return s.Applied == n })
	b.wantOneEffectEach(t, n)
	if s := c.Stats(); s.Failures+s.Duplicates != 0 {
		t.Errorf("%+v", s)
	}
}

func TestATransactionOfTheConsumerHasLimits(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	b.publish(t, numbered(1)...)
	settings := make(chan string, 1)
	c := b.start(t, func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		var got string
		err := tx.QueryRow(ctx, `SELECT concat_ws(' ', current_setting('lock_timeout'),
			current_setting('idle_in_transaction_session_timeout'), current_setting('tcp_user_timeout'))`).Scan(&got)
		settings <- got
		return err
	})
	if got := <-settings; got != "5s 40s 10000" {
		t.Errorf("got %q", got)
	}
	c.waitFor(t, "applied", func(s inbox.Stats) bool { return s.Applied == 1 })
	c.stop()
	var outside string
	if err := b.QueryRow(b.ctx, "SELECT current_setting('lock_timeout')").Scan(&outside); err != nil || outside != "0" {
		t.Errorf("outside: %q, %v", outside, err)
	}
}

// A line is logged when something changes, not whenever it is tried.
func TestAnOutageIsLoggedOnce(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	server := newProxy(t, testenv.AMQPURL(t))
	var log lockedBuffer
	cfg := b.config(t)
	cfg.Logger = log.logger()
	c := b.run(t, b.Pool, server.url, b.apply, cfg)
	c.waitReady(t)
	server.setDown(true)
	dials := server.dials.Load()
	testenv.Eventually(t, testLimit, "dialled several times", func() bool { return server.dials.Load() >= dials+4 })
	server.setDown(false)
	c.waitReady(t)
	c.stop()
	if lines := strings.Split(strings.TrimSpace(log.String()), "\n"); len(lines) != 3 {
		t.Errorf("%d lines:\n%s", len(lines), strings.Join(lines, "\n"))
	}
	if strings.Contains(log.String(), "amqp://") {
		t.Error("shows the URL")
	}
}
