package inbox_test

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/txbox/txbox/inbox"
	"github.com/txbox/txbox/internal/testenv"
	"github.com/txbox/txbox/outbox"
)

// pipeline leaves the effect of a message in the pipeline.
func (e *env) pipeline(tx pgx.Tx, id string) *pgx.QueuedQuery {
	return inbox.Pipeline(tx).Queue(e.effectSQL(), id)
}

func TestPipelinedStatementsTakeNoRoundTripEach(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	database := newProxy(t, withParam(t, b.URL, "sslmode", "disable"))
	const n = 100
	var writes, before atomic.Int64
	database.onWrite = func([]byte) (cut, swallow bool) {
		writes.Add(1)
		return false, false
	}
	c := b.inOneBatch(t, b.pool(t, database.url), b.config(t), func(_ context.Context, tx pgx.Tx, m inbox.Message) error {
		before.CompareAndSwap(0, writes.Load())
		b.pipeline(tx, m.ID)
		return nil
	}, keyed(n-1, "k")...)
	c.waitFor(t, "all applied", func(s inbox.Stats) bool { return s.Applied == n })
	c.stop()
	if made := writes.Load() - before.Load(); made > n/4 {
		t.Errorf("%d writes to the database for %d messages", made, n)
	}
	b.exec(t, "DELETE FROM "+b.Table("inbox")+" WHERE message_id = 'hold'")
	b.wantEffectsInOrder(t, n-1)
}

func TestAPipelinedStatementFailsItsMessageAlone(t *testing.T) {
	t.Parallel()
	for what, fail := range map[string]func(tx pgx.Tx){
		"statement": func(tx pgx.Tx) { inbox.Pipeline(tx).Queue("SELECT 1 / $1::int", 0) },
		"argument":  func(tx pgx.Tx) { inbox.Pipeline(tx).Queue("SELECT $1::int", "no number") },
		"end":       func(tx pgx.Tx) { inbox.Pipeline(tx).Queue("COMMIT") },
		"function": func(tx pgx.Tx) {
			inbox.Pipeline(tx).Queue("SELECT 1").Exec(func(pgconn.CommandTag) error { return inbox.Reject(errTest) })
		},
		"panic": func(tx pgx.Tx) {
			inbox.Pipeline(tx).Queue("SELECT 1").QueryRow(func(pgx.Row) error { panic("no") })
		},
	} {
		for _, seen := range []string{"at the end", "by a later handler"} {
			t.Run(what+" "+seen, func(t *testing.T) {
				t.Parallel()
				b := setupBroker(t)
				cfg := b.config(t)
				cfg.MaxAttempts = 1
				var calls atomic.Int64
				c := b.inOneBatch(t, b.Pool, cfg, func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
					calls.Add(1)
					switch m.ID {
					case "3":
						fail(tx)
					case "5":
						if seen == "at the end" {
							break
						}
						_, err := tx.Exec(ctx, "SELECT 1")
						if err == nil {
							break
						}
						return fmt.Errorf("of another: %w", err)
					}
					b.pipeline(tx, m.ID)
					return nil
				}, numbered(8)...)
				c.waitFor(t, "settled", func(s inbox.Stats) bool { return s.Applied == 8 && s.Parked["dead"] == 1 })
				c.stop()
				for i := range 8 {
					effects := 1
					if i == 3 {
						effects = 0
					}
					b.want(t, fmt.Sprint(i), 1, effects)
				}
				// Who it was is known, or found by halves.
				if s := c.Stats(); s.Failures != 1 || calls.Load() > 24 {
					t.Errorf("%d calls, %+v", calls.Load(), s)
				}
			})
		}
	}
}

// In the simple protocol the result of the second would be taken for the next message's.
func TestTwoStatementsInOneStringFailTheirMessageAlone(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	cfg := b.config(t)
	cfg.MaxAttempts = 1
	simple := b.pool(t, withParam(t, b.URL, "default_query_exec_mode", "simple_protocol"))
	c := b.inOneBatch(t, simple, cfg, func(_ context.Context, tx pgx.Tx, m inbox.Message) error {
		if m.ID == "0" {
			inbox.Pipeline(tx).Queue("SELECT 1; SELECT 2")
			return nil
		}
		b.pipeline(tx, m.ID).Exec(func(tag pgconn.CommandTag) error {
			if tag.String() != "INSERT 0 1" {
				t.Errorf("message %s sees %s", m.ID, tag)
			}
			return nil
		})
		return nil
	}, numbered(3)...)
	c.waitFor(t, "settled", func(s inbox.Stats) bool { return s.Applied == 3 && s.Parked["dead"] == 1 })
	c.stop()
	b.want(t, "0", 1, 0)
	b.want(t, "2", 1, 1)
}

// Handlers that send nothing, together for longer than PostgreSQL lets a transaction idle.
func TestABatchOfSlowHandlersIsAppliedAtOnce(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	cfg := b.config(t)
	cfg.Timeout = 2 * time.Second
	const n = 9
	var calls atomic.Int64
	c := b.inOneBatch(t, b.Pool, cfg, func(_ context.Context, tx pgx.Tx, m inbox.Message) error {
		calls.Add(1)
		time.Sleep(1500 * time.Millisecond)
		b.pipeline(tx, m.ID)
		return nil
	}, numbered(n)...)
	c.waitFor(t, "all applied", func(s inbox.Stats) bool { return s.Applied == n+1 })
	c.stop()
	if calls.Load() != n {
		t.Errorf("%d calls for %d messages", calls.Load(), n)
	}
}

// Whatever a handler sends itself comes after what it has queued.
func TestPipelinedStatementsComeFirst(t *testing.T) {
	t.Parallel()
	e := setup(t)
	sees := "SELECT 1 / count(*)::int FROM " + e.Table("effects") + " WHERE message_id = $1"
	for way, send := range map[string]func(ctx context.Context, tx pgx.Tx) error{
		"Exec": func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Exec(ctx, sees, "Exec")
			return err
		},
		"Query": func(ctx context.Context, tx pgx.Tx) error {
			rows, _ := tx.Query(ctx, sees, "Query")
			_, err := pgx.CollectRows(rows, pgx.RowTo[int])
			return err
		},
		"QueryRow": func(ctx context.Context, tx pgx.Tx) error {
			var n int
			return tx.QueryRow(ctx, sees, "QueryRow").Scan(&n)
		},
		"SendBatch": func(ctx context.Context, tx pgx.Tx) error {
			batch := &pgx.Batch{}
			batch.Queue(sees, "SendBatch")
			return tx.SendBatch(ctx, batch).Close()
		},
		"Conn": func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Conn().Exec(ctx, sees, "Conn")
			return err
		},
		"LargeObjects": func(ctx context.Context, tx pgx.Tx) error {
			objects := tx.LargeObjects()
			if inbox.Pipeline(tx).Len() > 0 {
				return errTest
			}
			_, err := objects.Create(ctx, 0)
			return err
		},
		"Prepare": func(ctx context.Context, tx pgx.Tx) error {
			if _, err := tx.Prepare(ctx, "sees", sees); err != nil {
				return err
			}
			_, err := tx.Conn().Exec(ctx, "sees", "Prepare")
			return err
		},
		"Begin": func(ctx context.Context, tx pgx.Tx) error {
			return pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error {
				_, err := tx.Conn().Exec(ctx, sees, "Begin")
				return err
			})
		},
		"CopyFrom": func(ctx context.Context, tx pgx.Tx) error {
			rows := pgx.CopyFromRows([][]any{{"copied"}})
			if _, err := tx.CopyFrom(ctx, pgx.Identifier{e.DB.Schema, "effects"}, []string{"message_id"}, rows); err != nil {
				return err
			}
			_, err := tx.Conn().Exec(ctx, sees, "CopyFrom")
			return err
		},
	} {
		first, err := e.Handle(e.ctx, e.Pool, consumer, way, func(ctx context.Context, tx pgx.Tx) error {
			e.pipeline(tx, way)
			return send(ctx, tx)
		})
		if !first || err != nil {
			t.Errorf("%s: %v, %v", way, first, err)
		}
		e.want(t, way, 1, 1)
	}
}

func TestSavepointsRollBackWhatIsQueuedInThem(t *testing.T) {
	t.Parallel()
	e := setup(t)
	first, err := e.Handle(e.ctx, e.Pool, consumer, "m", func(ctx context.Context, tx pgx.Tx) error {
		e.pipeline(tx, "before")
		err := pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error {
			e.pipeline(tx, "never sent")
			return errTest
		})
		if err == nil {
			t.Error("no error")
		}
		err = pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error {
			inbox.Pipeline(tx).Queue("SELECT 1 / 0")
			return nil
		})
		if err == nil || !strings.Contains(err.Error(), "22012") {
			t.Errorf("got %v", err)
		}
		nested, err := tx.Begin(ctx)
		if err != nil {
			return err
		}
		defer nested.Rollback(ctx)
		e.pipeline(nested, "nested")
		if err := nested.Commit(ctx); err != nil {
			return err
		}
		e.pipeline(tx, "m") // and is there after the Rollback
		return nil
	})
	if !first || err != nil {
		t.Errorf("%v, %v", first, err)
	}
	e.want(t, "m", 1, 1)
	if n := e.count(t, "effects", "message_id IN ('before', 'nested')"); n != 2 || e.count(t, "effects", "true") != 3 {
		t.Errorf("%d of 2 effects", n)
	}
}

func TestPipelineTakesMessagesOfTheOutbox(t *testing.T) {
	t.Parallel()
	e := setup(t)
	writer := outbox.Writer{Schema: e.DB.Schema}
	first, err := e.Handle(e.ctx, e.Pool, consumer, "m", func(ctx context.Context, tx pgx.Tx) error {
		e.pipeline(tx, "m")
		return writer.Queue(ctx, inbox.Pipeline(tx), outbox.Message{Exchange: "x", RoutingKey: "k", Payload: []byte("{}")})
	})
	if !first || err != nil {
		t.Errorf("%v, %v", first, err)
	}
	e.want(t, "m", 1, 1)
	if n := e.count(t, "outbox", "true"); n != 1 {
		t.Errorf("%d messages in the outbox", n)
	}
}

func TestAFunctionOfAQueuedStatementMayQueueAnotherStatement(t *testing.T) {
	t.Parallel()
	e := setup(t)
	first, err := e.Handle(e.ctx, e.Pool, consumer, "m", func(ctx context.Context, tx pgx.Tx) error {
		inbox.Pipeline(tx).Queue("SELECT 1").Exec(func(pgconn.CommandTag) error {
			e.pipeline(tx, "m")
			return nil
		})
		return nil
	})
	if !first || err != nil {
		t.Errorf("%v, %v", first, err)
	}
	e.want(t, "m", 1, 1)
	first, err = e.Handle(e.ctx, e.Pool, consumer, "uses tx", func(ctx context.Context, tx pgx.Tx) error {
		inbox.Pipeline(tx).Queue("SELECT 1").Exec(func(pgconn.CommandTag) error {
			_, err := tx.Exec(ctx, e.effectSQL(), "uses tx")
			return err
		})
		return nil
	})
	if first || err == nil {
		t.Errorf("%v, %v", first, err)
	}
	e.want(t, "uses tx", 0, 0)
}

// A table is locked for longer than a lock is waited for, also to prepare a queued statement.
// That is the handler's failure, as if it had sent the statement itself.
func TestAPipelinedStatementThatMeetsALockFails(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	lock, err := b.Begin(b.ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Rollback(b.ctx)
	if _, err := lock.Exec(b.ctx, "LOCK TABLE "+b.Table("effects")); err != nil {
		t.Fatal(err)
	}
	cfg := b.config(t)
	cfg.MaxAttempts = 1
	c := b.run(t, b.Pool, testenv.AMQPURL(t), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		b.pipeline(tx, m.ID)
		if m.ID == "0" {
			return nil
		}
		_, err := tx.Exec(ctx, "SELECT 1") // sends it
		return err
	}, cfg)
	b.publish(t, numbered(2)...)
	c.waitFor(t, "dead", func(s inbox.Stats) bool { return s.Parked["dead"] == 2 })
	c.stop()
}

func TestPipelineOfAnotherTransactionPanics(t *testing.T) {
	t.Parallel()
	e := setup(t)
	tx, err := e.Begin(e.ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(e.ctx)
	defer func() {
		if reason := recover(); reason == nil {
			t.Error("no panic")
		}
	}()
	inbox.Pipeline(tx)
}

// pgx closes the connection when it cannot encode an argument: that is no outage.
func TestAnArgumentThatIsMissingCostsItsBatchNoRunsInVain(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	cfg := b.config(t)
	cfg.MaxAttempts = 1
	const n = 16
	var calls atomic.Int64
	c := b.inOneBatch(t, b.Pool, cfg, func(_ context.Context, tx pgx.Tx, m inbox.Message) error {
		calls.Add(1)
		b.pipeline(tx, m.ID)
		if m.ID == "9" {
			inbox.Pipeline(tx).Queue("SELECT $1::int")
		}
		return nil
	}, numbered(n)...)
	c.waitFor(t, "settled", func(s inbox.Stats) bool { return s.Applied == n && s.Parked["dead"] == 1 })
	c.stop()
	if calls.Load() > 4*n { // found by halves
		t.Errorf("%d calls for %d messages", calls.Load(), n)
	}
	b.want(t, "9", 1, 0)
}
