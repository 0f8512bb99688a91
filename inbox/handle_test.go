package inbox_test

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"github.com/txbox/txbox/inbox"
	"github.com/txbox/txbox/internal/testenv"
)

// A session is what a handler does in its transaction, whatever its type.
type session interface {
	exec(ctx context.Context, sql string, args ...any) error
	hidden(ctx context.Context, sql string) error // so that the transaction does not see it
	commit(ctx context.Context) error
}

type pgxSession struct{ pgx.Tx }

func (s pgxSession) commit(ctx context.Context) error { return s.Commit(ctx) }
func (s pgxSession) exec(ctx context.Context, sql string, args ...any) error {
	_, err := s.Exec(ctx, sql, args...)
	return err
}

func (s pgxSession) hidden(ctx context.Context, sql string) error {
	_, err := s.Conn().Exec(ctx, sql)
	return err
}

type sqlSession struct{ *sql.Tx }

func (s sqlSession) commit(context.Context) error { return s.Commit() }
func (s sqlSession) exec(ctx context.Context, sql string, args ...any) error {
	_, err := s.ExecContext(ctx, sql, args...)
	return err
}

func (s sqlSession) hidden(ctx context.Context, sql string) error { return s.exec(ctx, sql) }

type handleFunc func(ctx context.Context, id string, fn func(context.Context, session) error) (bool, error)

// An entry is one way into the same promises: the suite below holds for all.
type entry struct {
	name    string
	refuses bool // the transaction refuses to be committed by the handler
	open    func(t *testing.T, e *env, dbURL string) handleFunc
}

var entries = []entry{
	{"Handle", true, openPgx},
	{"Handle exec mode", true, func(t *testing.T, e *env, dbURL string) handleFunc {
		return openPgx(t, e, withParam(t, dbURL, "default_query_exec_mode", "exec"))
	}},
	{"HandleSQL pgx", false, func(t *testing.T, e *env, dbURL string) handleFunc { return openSQL(t, e, "pgx", dbURL) }},
	{"HandleSQL lib/pq", false, func(t *testing.T, e *env, dbURL string) handleFunc { return openSQL(t, e, "postgres", dbURL) }},
}

const consumer = "payments"

func openPgx(t *testing.T, e *env, dbURL string) handleFunc {
	db := e.pool(t, dbURL)
	return func(ctx context.Context, id string, fn func(context.Context, session) error) (bool, error) {
		return e.Handle(ctx, db, consumer, id, func(ctx context.Context, tx pgx.Tx) error { return fn(ctx, pgxSession{tx}) })
	}
}

func openSQL(t *testing.T, e *env, driver, dbURL string) handleFunc {
	db, err := sql.Open(driver, withParam(t, dbURL, "sslmode", "disable"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return func(ctx context.Context, id string, fn func(context.Context, session) error) (bool, error) {
		return e.HandleSQL(ctx, db, consumer, id, func(ctx context.Context, tx *sql.Tx) error { return fn(ctx, sqlSession{tx}) })
	}
}

// effect returns a handler that leaves one row in effects.
func (e *env) effect(id string) func(context.Context, session) error {
	return func(ctx context.Context, tx session) error { return tx.exec(ctx, e.effectSQL(), id) }
}

// conform runs test for every entry at every isolation level.
func conform(t *testing.T, test func(t *testing.T, e *env, entry entry, handle handleFunc)) {
	t.Parallel()
	for _, entry := range entries {
		for _, isolation := range []string{"read committed", "repeatable read", "serializable"} {
			t.Run(entry.name+" "+isolation, func(t *testing.T) {
				t.Parallel()
				e := setup(t)
				test(t, e, entry, entry.open(t, e, withParam(t, e.URL, "default_transaction_isolation", isolation)))
			})
		}
	}
}

func TestHandleHasOneEffectWhenCalledAgain(t *testing.T) {
	conform(t, func(t *testing.T, e *env, _ entry, handle handleFunc) {
		for call := range 3 {
			first, err := handle(e.ctx, "m", e.effect("m"))
			if err != nil || first != (call == 0) {
				t.Errorf("call %d: first %v, %v", call, first, err)
			}
		}
		e.want(t, "m", 1, 1)
	})
}

func TestHandleHasOneEffectForFiveConcurrentTwins(t *testing.T) {
	conform(t, func(t *testing.T, e *env, _ entry, handle handleFunc) {
		for round := range 5 {
			id := fmt.Sprint(round)
			firsts := make(chan bool, 5)
			var group errgroup.Group
			for range cap(firsts) {
				group.Go(func() error {
					first, err := handle(e.ctx, id, e.effect(id))
					firsts <- first
					return err
				})
			}
			if err := group.Wait(); err != nil {
				t.Fatal(err)
			}
			n := 0
			for range cap(firsts) {
				if <-firsts {
					n++
				}
			}
			if n != 1 {
				t.Errorf("%d were the first", n)
			}
			e.want(t, id, 1, 1)
		}
	})
}

func TestHandleLetsTheTwinProceedWhenTheFirstRollsBack(t *testing.T) {
	conform(t, func(t *testing.T, e *env, _ entry, handle handleFunc) {
		recorded, fail := make(chan struct{}), make(chan struct{})
		letFail := sync.OnceFunc(func() { close(fail) })
		t.Cleanup(letFail)
		var group errgroup.Group
		group.Go(func() error {
			first, err := handle(e.ctx, "m", func(ctx context.Context, tx session) error {
				close(recorded)
				<-fail
				return errTest
			})
			if first || !errors.Is(err, errTest) {
				return fmt.Errorf("the first: %v, %w", first, err)
			}
			return nil
		})
		group.Go(func() error {
			<-recorded
			first, err := handle(e.ctx, "m", e.effect("m"))
			if !first || err != nil {
				return fmt.Errorf("the twin: %v, %w", first, err)
			}
			return nil
		})
		<-recorded
		e.waitForLockWait(t)
		letFail()
		if err := group.Wait(); err != nil {
			t.Fatal(err)
		}
		e.want(t, "m", 1, 1)
	})
}

// waitForLockWait returns when a session waits for another to end its transaction
// on a row of this schema's inbox.
func (e *env) waitForLockWait(t *testing.T) {
	t.Helper()
	testenv.Eventually(t, testLimit, "a twin waits", func() bool { return e.lockWaits(t) > 0 })
}

// lockWaits returns how many sessions wait like that.
func (e *env) lockWaits(t *testing.T) (n int) {
	t.Helper()
	err := e.QueryRow(e.ctx, `SELECT count(*) FROM pg_stat_activity
		WHERE wait_event_type = 'Lock' AND position($1 IN query) > 0`, e.Table("inbox")).Scan(&n)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestHandleRecordsNothingWhenTheHandlerFails(t *testing.T) {
	conform(t, func(t *testing.T, e *env, _ entry, handle handleFunc) {
		first, err := handle(e.ctx, "m", func(ctx context.Context, tx session) error {
			if err := e.effect("m")(ctx, tx); err != nil {
				t.Error(err)
			}
			return errTest
		})
		if first || !errors.Is(err, errTest) {
			t.Errorf("%v, %v", first, err)
		}
		e.want(t, "m", 0, 0)
	})
}

func TestHandleRollsBackWhenTheHandlerPanics(t *testing.T) {
	conform(t, func(t *testing.T, e *env, _ entry, handle handleFunc) {
		func() {
			defer func() {
				if recover() != "boom" {
					t.Error("the panic did not go on")
				}
			}()
			_, _ = handle(e.ctx, "m", func(ctx context.Context, tx session) error {
				if err := e.effect("m")(ctx, tx); err != nil {
					t.Error(err)
				}
				panic("boom")
			})
		}()
		e.want(t, "m", 0, 0)
		if first, err := handle(e.ctx, "m", e.effect("m")); !first || err != nil {
			t.Errorf("afterwards: %v, %v", first, err)
		}
	})
}

func TestHandleReportsAnErrorOfTheDatabaseThatTheHandlerSwallowed(t *testing.T) {
	conform(t, func(t *testing.T, e *env, _ entry, handle handleFunc) {
		first, err := handle(e.ctx, "m", func(ctx context.Context, tx session) error {
			_ = e.effect("m")(ctx, tx)
			_ = tx.exec(ctx, "SELECT 1/0")
			return nil
		})
		if first || err == nil || errors.Is(err, inbox.ErrCommitUnknown) {
			t.Errorf("%v, %v", first, err)
		}
		e.want(t, "m", 0, 0)
	})
}

func TestHandleReportsACommitThatTheServerRefuses(t *testing.T) {
	conform(t, func(t *testing.T, e *env, _ entry, handle handleFunc) {
		e.exec(t, "CREATE TABLE "+e.Table("late")+" (n integer UNIQUE DEFERRABLE INITIALLY DEFERRED)")
		first, err := handle(e.ctx, "m", func(ctx context.Context, tx session) error {
			return errors.Join(e.effect("m")(ctx, tx), tx.exec(ctx, "INSERT INTO "+e.Table("late")+" VALUES (1), (1)"))
		})
		if first || err == nil || errors.Is(err, inbox.ErrCommitUnknown) || !strings.Contains(err.Error(), "late_n_key") {
			t.Errorf("%v, %v", first, err)
		}
		e.want(t, "m", 0, 0)
	})
}

func TestHandleNeverReportsSuccessWhenTheHandlerEndsTheTransaction(t *testing.T) {
	conform(t, func(t *testing.T, e *env, entry entry, handle handleFunc) {
		for name, end := range map[string]func(context.Context, session) error{
			"method":           func(ctx context.Context, tx session) error { return tx.commit(ctx) },
			"COMMIT":           func(ctx context.Context, tx session) error { return tx.exec(ctx, " commit") },
			"ROLLBACK":         func(ctx context.Context, tx session) error { return tx.exec(ctx, "ROLLBACK WORK") },
			"hidden COMMIT":    func(ctx context.Context, tx session) error { return tx.hidden(ctx, "COMMIT") },
			"hidden ROLLBACK":  func(ctx context.Context, tx session) error { return tx.hidden(ctx, "ROLLBACK") },
			"COMMIT and go on": func(ctx context.Context, tx session) error { return tx.hidden(ctx, "COMMIT; SELECT 1") },
		} {
			if strings.HasSuffix(name, "go on") && entry.name != "Handle" {
				continue // several statements in one string are not every driver's
			}
			first, err := handle(e.ctx, name, func(ctx context.Context, tx session) error {
				if err := e.effect(name)(ctx, tx); err != nil {
					t.Error(err)
				}
				_ = end(ctx, tx)
				return nil
			})
			hidden := strings.HasPrefix(name, "hidden") || strings.HasSuffix(name, "go on")
			if first || err == nil || errors.Is(err, inbox.ErrTxEnded) != (hidden || !entry.refuses) {
				t.Errorf("%s: %v, %v", name, first, err)
			}
			if entry.refuses && !hidden {
				e.want(t, name, 0, 0)
			}
			if first, err := handle(e.ctx, name+" again", e.effect(name+" again")); !first || err != nil {
				t.Errorf("after %s: %v, %v", name, first, err)
			}
		}
	})
}

func TestHandleRunsAgainAfterConflicts(t *testing.T) {
	conform(t, func(t *testing.T, e *env, _ entry, handle handleFunc) {
		for _, code := range []string{"40001", "40P01"} {
			runs := 0
			first, err := handle(e.ctx, code, func(ctx context.Context, tx session) error {
				if runs++; runs < 3 {
					return tx.exec(ctx, "DO $$ BEGIN RAISE SQLSTATE '"+code+"'; END $$")
				}
				return e.effect(code)(ctx, tx)
			})
			if !first || err != nil || runs != 3 {
				t.Errorf("%s: %v, %v, %d runs", code, first, err, runs)
			}
			e.want(t, code, 1, 1)
		}
		runs := 0
		first, err := handle(e.ctx, "always", func(ctx context.Context, tx session) error {
			runs++
			return tx.exec(ctx, "DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")
		})
		if first || err == nil || runs != 10 {
			t.Errorf("%v, %v, %d runs", first, err, runs)
		}
	})
}

func TestHandleDoesNothingAfterCancel(t *testing.T) {
	conform(t, func(t *testing.T, e *env, _ entry, handle handleFunc) {
		ctx, cancel := context.WithCancel(e.ctx)
		first, err := handle(ctx, "during", func(ctx context.Context, tx session) error {
			err := e.effect("during")(ctx, tx)
			cancel()
			return err
		})
		if first || !errors.Is(err, context.Canceled) || errors.Is(err, inbox.ErrCommitUnknown) {
			t.Errorf("during: %v, %v", first, err)
		}
		e.want(t, "during", 0, 0)
		first, err = handle(ctx, "before", func(context.Context, session) error {
			t.Error("called")
			return nil
		})
		if first || !errors.Is(err, context.Canceled) {
			t.Errorf("before: %v, %v", first, err)
		}
	})
}

// The connection breaks right before or right after the server got COMMIT.
func TestHandleHasOneEffectAfterACommitOfUnknownOutcome(t *testing.T) {
	t.Parallel()
	for _, entry := range entries {
		for _, reached := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s reached=%v", entry.name, reached), func(t *testing.T) {
				t.Parallel()
				e := setup(t)
				server := newProxy(t, withParam(t, e.URL, "sslmode", "disable"))
				broken := false
				server.onWrite = func(b []byte) (cut, swallow bool) {
					if broken || !bytes.Contains(bytes.ToLower(b), []byte("commit\x00")) {
						return false, false
					}
					broken = true
					return !reached, reached
				}
				handle := entry.open(t, e, server.url)
				first, err := handle(e.ctx, "m", e.effect("m"))
				if first || !errors.Is(err, inbox.ErrCommitUnknown) {
					t.Fatalf("%v, %v", first, err)
				}
				if reached {
					e.want(t, "m", 1, 1)
				}
				first, err = handle(e.ctx, "m", e.effect("m"))
				if err != nil || first == reached {
					t.Errorf("again: %v, %v", first, err)
				}
				e.want(t, "m", 1, 1)
			})
		}
	}
}

func TestHandleLetsTheHandlerUseSavepoints(t *testing.T) {
	t.Parallel()
	e := setup(t)
	first, err := e.Handle(e.ctx, e.Pool, consumer, "m", func(ctx context.Context, tx pgx.Tx) error {
		for _, commit := range []bool{true, false} {
			nested, err := tx.Begin(ctx)
			if err != nil {
				return err
			}
			if _, err := nested.Exec(ctx, e.effectSQL(), "m"); err != nil {
				return err
			}
			end := nested.Rollback
			if commit {
				end = nested.Commit
			}
			if err := end(ctx); err != nil {
				return err
			}
		}
		for _, sql := range []string{"SAVEPOINT s", "ROLLBACK TO s", "rollback work to savepoint s", "RELEASE s"} {
			if _, err := tx.Exec(ctx, sql); err != nil {
				return err
			}
		}
		return nil
	})
	if !first || err != nil {
		t.Fatalf("%v, %v", first, err)
	}
	e.want(t, "m", 1, 1)
}

func TestHandleNamesRowsThatTheHandlerLeftOpen(t *testing.T) {
	t.Parallel()
	e := setup(t)
	first, err := e.Handle(e.ctx, e.Pool, consumer, "m", func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Query(ctx, "SELECT generate_series(1, 1000000)") //nolint // left open on purpose
		return err
	})
	if first || err == nil || errors.Is(err, inbox.ErrCommitUnknown) {
		t.Errorf("%v, %v", first, err)
	}
	e.want(t, "m", 0, 0)
}
