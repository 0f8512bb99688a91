package inbox_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/inbox"
	"github.com/txbox/txbox/internal/testenv"
)

// parkedRow is what a test asks about a parked message.
type parkedRow struct {
	reason, lastError string
	attempts          int
}

func (b *broker) parked(t *testing.T, id string) parkedRow {
	t.Helper()
	var row parkedRow
	err := b.QueryRow(b.ctx, `SELECT reason, last_error, attempts FROM `+b.Table("inbox_parked")+`
		WHERE consumer = $1 AND message_id = $2`, consumer, id).Scan(&row.reason, &row.lastError, &row.attempts)
	if err != nil {
		t.Fatalf("parked %s: %v", id, err)
	}
	return row
}

// hasten makes every parked message due.
func (b *broker) hasten(t *testing.T) {
	b.exec(t, "UPDATE "+b.Table("inbox_parked")+" SET due_at = now() - interval '1 second' WHERE reason = 'retry'")
}

func TestAFailedMessageIsParkedAndAppliedLater(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	b.publish(t, numbered(5)...)
	c := b.start(t, func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if err := b.apply(ctx, tx, m); err != nil {
			return err
		}
		if m.ID == "3" && m.Attempt < 3 {
			return errTest
		}
		return nil
	})
	c.waitFor(t, "all applied", func(s inbox.Stats) bool { return s.Applied == 5 })
	b.wantOneEffectEach(t, 5)
	if n := b.count(t, "effects", "message_id = '3' AND attempt = 3"); n != 1 {
		t.Error("not applied by the third attempt")
	}
	if n := b.count(t, "inbox_parked", "true"); n != 0 {
		t.Errorf("%d still parked", n)
	}
	if s := c.Stats(); s.Failures != 2 || s.Parked["retry"] != 2 {
		t.Errorf("%+v", s)
	}
	c.stop()
	b.wantReady(t, 0)
}

func TestAParkedMessageIsADuplicateWhenDeliveredAgain(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	b.publish(t, numbered(1)...)
	c := b.start(t, func(context.Context, pgx.Tx, inbox.Message) error { return inbox.Reject(errTest) })
	c.waitFor(t, "parked", func(s inbox.Stats) bool { return s.Parked["dead"] == 1 })
	b.publish(t, numbered(1)...)
	c.waitFor(t, "duplicate", func(s inbox.Stats) bool { return s.Duplicates == 1 })
	b.want(t, "0", 1, 0)
	if row := b.parked(t, "0"); row.attempts != 1 {
		t.Errorf("%+v", row)
	}
}

func TestRejectIsDeadAtOnce(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	b.publish(t, numbered(2)...)
	c := b.start(t, func(_ context.Context, _ pgx.Tx, m inbox.Message) error {
		if m.ID == "0" {
			return inbox.Reject(nil)
		}
		return fmt.Errorf("wrapped: %w", inbox.Reject(errTest))
	})
	c.waitFor(t, "dead", func(s inbox.Stats) bool { return s.Parked["dead"] == 2 })
	if row := b.parked(t, "1"); row.reason != "dead" || row.attempts != 1 || !strings.Contains(row.lastError, errTest.Error()) {
		t.Errorf("%+v", row)
	}
}

func TestMaxAttemptsMakeAMessageDead(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	b.publish(t, numbered(1)...)
	cfg := b.config(t)
	cfg.MaxAttempts = 2
	var attempts atomic.Int64
	c := b.run(t, b.Pool, testenv.AMQPURL(t), func(_ context.Context, _ pgx.Tx, m inbox.Message) error {
		if n := attempts.Add(1); int(n) != m.Attempt {
			t.Errorf("attempt %d calls itself %d", n, m.Attempt)
		}
		return errTest
	}, cfg)
	c.waitFor(t, "dead", func(s inbox.Stats) bool { return s.Parked["dead"] == 1 })
	if row := b.parked(t, "0"); row.reason != "dead" || row.attempts != 2 || attempts.Load() != 2 {
		t.Errorf("%+v after %d attempts", row, attempts.Load())
	}
}

func TestRetryAfterSpendsNoAttempt(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	b.publish(t, numbered(1)...)
	cfg := b.config(t)
	cfg.MaxAttempts = 1
	var calls atomic.Int64
	c := b.run(t, b.Pool, testenv.AMQPURL(t), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if m.Attempt != 1 {
			t.Errorf("attempt %d", m.Attempt)
		}
		if calls.Add(1) < 4 {
			return inbox.RetryAfter(time.Hour, nil)
		}
		return b.apply(ctx, tx, m)
	}, cfg)
	for n := uint64(1); n <= 3; n++ {
		c.waitFor(t, "postponed", func(s inbox.Stats) bool { return s.Parked["retry"] == n })
		if n := b.count(t, "inbox_parked", "attempts = 0 AND due_at BETWEEN now() + interval '59 minutes' AND now() + interval '1 hour'"); n != 1 {
			t.Errorf("not postponed by an hour at no cost: %+v", b.parked(t, "0"))
		}
		b.hasten(t)
	}
	c.waitFor(t, "applied", func(s inbox.Stats) bool { return s.Applied == 1 })
	b.want(t, "0", 1, 1)
}

func TestAPanicIsParkedWithItsStack(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	b.publish(t, numbered(1)...)
	c := b.start(t, func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if err := b.apply(ctx, tx, m); err != nil {
			return err
		}
		panic("boom \x00\xff" + strings.Repeat("é", 100))
	})
	c.waitFor(t, "parked", func(s inbox.Stats) bool { return s.Parked["retry"] == 1 })
	row := b.parked(t, "0")
	if !strings.Contains(row.lastError, "boom") || !strings.Contains(row.lastError, "park_test.go") || len(row.lastError) > 4<<10 {
		t.Errorf("%+v", row)
	}
	b.want(t, "0", 1, 0)
}

func TestAHandlerThatTakesTooLongIsParked(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	b.publish(t, numbered(2)...)
	cfg := b.config(t)
	cfg.Timeout = 50 * time.Millisecond
	c := b.run(t, b.Pool, testenv.AMQPURL(t), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if m.ID == "0" {
			_, err := tx.Exec(ctx, "SELECT pg_sleep(600)")
			return err
		}
		<-ctx.Done()
		return ctx.Err()
	}, cfg)
	testenv.Eventually(t, testLimit, "both are parked", func() bool { return b.count(t, "inbox_parked", "true") == 2 })
	c.stop()
	for _, id := range []string{"0", "1"} {
		if row := b.parked(t, id); !strings.Contains(row.lastError, "not done after 50ms") {
			t.Errorf("%+v", row)
		}
		b.want(t, id, 1, 0)
	}
}

func TestAHandlerThatEndsItsTransactionLosesNothing(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	ends := []string{"COMMIT", "ROLLBACK", "COMMIT", "ROLLBACK"} // the latter two behind the back of tx
	b.publish(t, numbered(len(ends))...)
	cfg := b.config(t)
	cfg.MaxAttempts = 1
	c := b.run(t, b.Pool, testenv.AMQPURL(t), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if err := b.apply(ctx, tx, m); err != nil {
			return err
		}
		i := m.ID[0] - '0'
		if i < 2 {
			_, _ = tx.Exec(ctx, ends[i])
			return nil
		}
		_, err := tx.Conn().Exec(ctx, ends[i])
		return err
	}, cfg)
	c.waitFor(t, "dead", func(s inbox.Stats) bool { return s.Parked["dead"] == uint64(len(ends)) })
	for i, effects := range []int{0, 0, 1, 0} { // the third did commit: that is for a human
		id := fmt.Sprint(i)
		b.want(t, id, 1, effects)
		if row := b.parked(t, id); row.reason != "dead" || !strings.Contains(row.lastError, "end") {
			t.Errorf("%s: %+v", id, row)
		}
	}
}

// As above, but in an attempt after the first: the row is gone by then.
func TestAHandlerThatEndsItsTransactionLaterLosesNothing(t *testing.T) {
	t.Parallel()
	for _, end := range []string{"COMMIT", "ROLLBACK"} {
		t.Run(end, func(t *testing.T) {
			t.Parallel()
			b := setupBroker(t)
			b.publish(t, numbered(1)...)
			c := b.start(t, func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
				if m.Attempt == 1 {
					return errTest
				}
				_, err := tx.Conn().Exec(ctx, end)
				return err
			})
			c.waitFor(t, "dead", func(s inbox.Stats) bool { return s.Parked["dead"] == 1 })
			if row := b.parked(t, "0"); row.reason != "dead" || !strings.Contains(row.lastError, "ended") {
				t.Errorf("%+v", row)
			}
			b.want(t, "0", 1, 0)
		})
	}
}

func TestMessagesWithoutAUsableIDAreParkedOnce(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	bad := []string{"a\x00b", "\xff\xfe"}
	ok := []string{strings.Repeat(`"`, 255), "'; DROP TABLE x; --", strings.Repeat("é", 127)}
	for range 2 { // the same again is the same
		for _, id := range append(append([]string{}, bad...), "") {
			b.publish(t, amqp.Publishing{MessageId: id, Body: []byte("payload")})
		}
	}
	b.publish(t, amqp.Publishing{Body: []byte("payload"), Headers: amqp.Table{"x-other": "1"}}) // another
	for _, id := range ok {
		b.publish(t, amqp.Publishing{MessageId: id})
	}
	c := b.start(t, b.apply)
	c.waitFor(t, "all settled", func(s inbox.Stats) bool {
		return s.Applied == 3 && s.Parked["missing_id"] == 2 && s.Parked["bad_id"] == 2
	})
	b.wantReady(t, 0)
	c.stop()
	if n := b.count(t, "inbox_parked", "reason = 'missing_id' AND body = 'payload' AND message_id IS NULL"); n != 2 {
		t.Errorf("%d with a missing ID", n)
	}
	if n := b.count(t, "inbox_parked", "reason = 'bad_id' AND position($1::bytea IN properties) > 0", []byte(bad[0])); n != 1 {
		t.Errorf("%d with the ID %q in the properties", n, bad[0])
	}
	if n := b.count(t, "inbox", "true"); n != len(ok) {
		t.Errorf("%d records", n)
	}
	b.wantReady(t, 0)
}

// A quorum queue counts deliveries in a header, which must not make another
// message of the same.
func TestARedeliveryWithoutAnIDIsParkedOnce(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	b.publish(t, amqp.Publishing{Body: []byte("payload")})
	first := b.start(t, b.apply)
	first.waitFor(t, "parked", func(s inbox.Stats) bool { return s.Parked["missing_id"] == 1 })
	first.stop()
	b.publish(t, amqp.Publishing{Body: []byte("payload")})
	d, _, err := b.Get(b.queue, false)
	if err != nil || d.Nack(false, true) != nil {
		t.Fatal(err)
	}
	second := b.start(t, b.apply)
	b.wantReady(t, 0)
	second.stop()
	if s := second.Stats(); s.Parked["missing_id"] != 0 {
		t.Errorf("%+v", s)
	}
}

// An attempt is counted before it is made: a message that kills the process does
// not do so for ever.
func TestAnAttemptThatNeverEndedCounts(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	b.exec(t, "INSERT INTO "+b.Table("inbox")+" VALUES ($1, 'm')", consumer)
	b.exec(t, `INSERT INTO `+b.Table("inbox_parked")+` (consumer, message_id, reason, due_at, attempts)
		VALUES ($1, 'm', 'retry', now(), 10)`, consumer)
	c := b.start(t, func(context.Context, pgx.Tx, inbox.Message) error {
		t.Error("called")
		return nil
	})
	c.waitFor(t, "dead", func(s inbox.Stats) bool { return s.Parked["dead"] == 1 })
	if row := b.parked(t, "m"); row.reason != "dead" || row.attempts != 10 || !strings.Contains(row.lastError, "did not come to an end") {
		t.Errorf("%+v", row)
	}
}

func TestAnAttemptIsCountedBeforeItIsMade(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	b.publish(t, numbered(1)...)
	c := b.start(t, func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if m.Attempt == 1 {
			return errTest
		}
		var counted, putOff bool
		err := b.QueryRow(ctx, `SELECT attempts = 2, due_at > now() + interval '30 seconds'
			FROM `+b.Table("inbox_parked")).Scan(&counted, &putOff) // on another connection
		if err != nil || !counted || !putOff {
			t.Errorf("counted %v, put off %v, %v", counted, putOff, err)
		}
		return b.apply(ctx, tx, m)
	})
	c.waitFor(t, "applied", func(s inbox.Stats) bool { return s.Applied == 1 })
}

func TestTwoConsumersHandleAParkedMessageOnce(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	const n = 50
	b.publish(t, numbered(n)...)
	handler := func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if m.Attempt == 1 {
			return errTest
		}
		return b.apply(ctx, tx, m)
	}
	one, two := b.start(t, handler), b.start(t, handler)
	testenv.Eventually(t, testLimit, "all applied", func() bool {
		return one.Stats().Applied+two.Stats().Applied == n
	})
	one.stop()
	two.stop()
	b.wantOneEffectEach(t, n)
	if left := b.count(t, "inbox_parked", "true"); left != 0 {
		t.Errorf("%d still parked", left)
	}
}

func TestAPayloadThatIsNotJSONIsAFailure(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	b.publish(t, amqp.Publishing{MessageId: "good", Body: []byte(`{"n": 1}`)}, amqp.Publishing{MessageId: "bad", Body: []byte(`{"n": `)})
	type payload struct{ N int }
	c := b.start(t, inbox.JSON(func(ctx context.Context, tx pgx.Tx, m inbox.Message, p payload) error {
		if p.N != 1 {
			t.Errorf("%+v", p)
		}
		return b.apply(ctx, tx, m)
	}))
	c.waitFor(t, "settled", func(s inbox.Stats) bool { return s.Applied == 1 && s.Parked["retry"] >= 1 })
	if row := b.parked(t, "bad"); !strings.Contains(row.lastError, "decode payload") {
		t.Errorf("%+v", row)
	}
}

func TestAMessageIsTheSameWhenHandledAgain(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	var all [256]byte
	for i := range all {
		all[i] = byte(i)
	}
	bytes, now := string(all[:]), time.Now().Truncate(time.Second)
	b.publish(t, amqp.Publishing{
		MessageId: "m", Type: bytes[1:], ContentType: bytes[:255], ContentEncoding: "gzip", CorrelationId: "c", ReplyTo: "r",
		AppId: "a", Priority: 3, Timestamp: now, Body: all[:],
		Headers: amqp.Table{
			"outbox-key": bytes, "bytes": all[:], "int": int64(-7), "byte": byte(200), "bool": true, "float": 1.5, "nil": nil,
			"time": time.Unix(1700000000, 0), "decimal": amqp.Decimal{Scale: 2, Value: 12345},
			"list": []any{"a", int32(1)}, "table": amqp.Table{"b": "2", "a": "1"}, bytes[:255]: "name",
		},
	})
	seen := make(chan inbox.Message, 2)
	c := b.start(t, func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		copied := m
		copied.Headers, copied.Payload = maps.Clone(m.Headers), append([]byte{}, m.Payload...)
		seen <- copied
		m.Payload[0], m.Headers["bool"] = 'x', "changed by the handler"
		if m.Attempt == 1 {
			return errTest
		}
		return nil
	})
	c.waitFor(t, "applied", func(s inbox.Stats) bool { return s.Applied == 1 })
	first, second := <-seen, <-seen
	want := inbox.Message{
		ID: "m", Key: bytes, Type: bytes[1:], ContentType: bytes[:255], RoutingKey: b.queue, Payload: all[:],
		CreatedAt: now.UTC(), Attempt: 1,
		Headers: map[string]string{
			"outbox-key": bytes, "bytes": bytes, "int": "-7", "byte": "200", "bool": "true", "float": "1.5", "nil": "",
			"time": "2023-11-14T22:13:20Z", "decimal": "12345e-2", "list": "[a 1]", "table": "map[a:1 b:2]", bytes[:255]: "name",
		},
	}
	if !reflect.DeepEqual(first, want) {
		t.Errorf("first\n%+v\nwant\n%+v", first, want)
	}
	want.Attempt = 2
	if !reflect.DeepEqual(second, want) {
		t.Errorf("again\n%+v\nwant\n%+v", second, want)
	}
}

func TestCreatedAtIsThatOfTheOutbox(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	at := time.Now().Truncate(time.Second)
	written := at.Add(-time.Hour - 321099*time.Microsecond).In(time.FixedZone("", 3600))
	for id, m := range map[string]amqp.Publishing{
		"header":  {Headers: amqp.Table{"outbox-created-at": written.Format(time.RFC3339Nano)}, Timestamp: at},
		"forged":  {Headers: amqp.Table{"outbox-created-at": "yesterday"}, Timestamp: at},
		"neither": {},
	} {
		m.MessageId = id
		b.publish(t, m)
	}
	want := map[string]time.Time{"header": written.UTC(), "forged": at.UTC(), "neither": {}}
	c := b.start(t, func(_ context.Context, _ pgx.Tx, m inbox.Message) error {
		if m.CreatedAt != want[m.ID] {
			return errors.New("wrong")
		}
		return nil
	})
	c.waitFor(t, "settled", func(s inbox.Stats) bool { return s.Applied+s.Failures == 3 })
	if s := c.Stats(); s.Failures != 0 {
		t.Errorf("%+v", s)
	}
}

// What needs a human is told, whatever is said of messages that will be tried again.
func TestLogTellsWhatWaitsForAHuman(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	log := &lockedBuffer{}
	cfg := b.config(t)
	cfg.Logger = log.logger()
	c := b.run(t, b.Pool, testenv.AMQPURL(t), func(_ context.Context, _ pgx.Tx, m inbox.Message) error { return errors.New("no") }, cfg)
	b.publish(t, numbered(1)...)
	c.waitFor(t, "a failure", func(s inbox.Stats) bool { return s.Failures >= 1 })
	b.publish(t, amqp.Publishing{Body: []byte("no ID")})
	c.waitFor(t, "a message without an ID", func(s inbox.Stats) bool { return s.Parked["missing_id"] == 1 })
	c.stop()
	if text := log.String(); strings.Count(text, "reason=retry") == 0 || strings.Count(text, "reason=missing_id") != 1 {
		t.Errorf("the log is:\n%s", text)
	}
}
