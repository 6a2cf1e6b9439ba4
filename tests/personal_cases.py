"""Texts with and without personal data, in English and Korean. What must be found stands as ⟦kind:value⟧.

None of it belongs to anybody: numbers are made up and then given the check digit that they need. The last lines of both
parts were written after the patterns and changed none of them; three of their values are not found.
"""

from __future__ import annotations

FOUND = """
메일은 ⟦email:hong.gildong@naver.com⟧으로 보내 주세요.
이메일:⟦email:kim_87@gmail.com⟧
⟦email:LEE@COMPANY.CO.KR⟧입니다
문의 ⟦email:help+ko@whet-tool.io⟧, ⟦email:a.b-c@sub.mail.go.kr⟧
담당자(⟦email:park@example.com⟧)에게 연락
Write to ⟦email:jane.doe@example.org⟧.
<⟦email:j_smith99@yahoo.com⟧> wrote:
mailto:⟦email:sales@shop.store⟧?subject=hi
"⟦email:first.last@uni-heidelberg.de⟧" <x>
Send it to ⟦email:bob@host.travel⟧ or ⟦email:alice@a.museum⟧!
⟦email:user%tag@mail.example.net⟧
메일 ⟦email:hong (at) naver.com⟧ 로요
reach me: ⟦email:joe [at] example.com⟧ thanks
주소는⟦email:abc123＠daum.net⟧이고요
제 메일 ⟦email:x@y.kr⟧
⟦email:1234567@hanmail.net⟧ 이쪽으로
E-mail ⟦email:o.connor@irish.ie⟧; tel later
ssh ⟦email:root@server.example.com⟧ then type ls
⟦email:no-reply@service.app⟧에서 온 메일
id=⟦email:minsu@kakao.com⟧&x=1
제 번호는 ⟦phone:010-1234-5678⟧입니다.
⟦phone:01098765432⟧로 전화 주세요
연락처⟦phone:010 2345 6789⟧입니다
휴대폰: ⟦phone:010.3456.7890⟧
(⟦phone:011-234-5678⟧) 옛날 번호
⟦phone:016-9876-5432⟧, ⟦phone:019-123-4567⟧
국제전화는 ⟦phone:+82 10-1234-5678⟧
⟦phone:+82-10-9999-1234⟧로 문자
⟦phone:+821012345678⟧
⟦phone:82-10-5555-4444⟧ 왓츠앱
⟦phone:0082-10-1234-5678⟧
⟦phone:(010)1234-5678⟧
⟦phone:010)7777-8888⟧ 문의
⟦phone:010 - 2222 - 3333⟧
HP⟦phone:010-8282-1004⟧
사무실 ⟦phone:02-123-4567⟧번이요
사무실 ⟦phone:02-345-6789⟧번이요
서울 ⟦phone:02)2345-6789⟧
⟦phone:(02) 3456-7890⟧ 로 주세요
경기 ⟦phone:031-234-5678⟧ 부산 ⟦phone:051-765-4321⟧
인터넷 전화 ⟦phone:070-4567-8901⟧
안심번호 ⟦phone:0504-2345-6789⟧
⟦phone:0505-333-4444⟧
⟦phone:064.720.1234⟧ 제주
전화 ⟦phone:0212345678⟧
전화 ⟦phone:0234567890⟧
팩스: ⟦phone:0317654321⟧
전화번호 ⟦phone:02 567 8901⟧
⟦phone:０１０－１２３４－５６７８⟧ 전각
번호:⟦phone:010–4321–8765⟧(문자만)
⟦phone:010-1111-2222⟧,⟦phone:010-3333-4444⟧
1)⟦phone:010-4545-6767⟧ 2)⟦phone:010-7878-9090⟧
⟦phone:+82 2 345 6789⟧
⟦phone:+82-31-234-5678⟧
Call ⟦phone:(212) 555-0123⟧ today
Call ⟦phone:(415)555-2671⟧.
⟦phone:415-555-2671⟧ is my cell
⟦phone:1-800-555-0199⟧ toll free
⟦phone:+1 415 555 2671⟧
⟦phone:+1-212-555-0123⟧
⟦phone:+14155552671⟧
⟦phone:+1 (303) 555-7788⟧
⟦phone:646.555.3890⟧
phone ⟦phone:4155552671⟧ is here
My phone: ⟦phone:4155552671⟧
Tel. ⟦phone:702 555 0142⟧
Mobile ⟦phone:305 5550199⟧
⟦phone:(808) 555 0134⟧
London ⟦phone:+44 20 7946 0958⟧
⟦phone:+447911123456⟧ in the UK
Tokyo ⟦phone:+81-3-1234-5678⟧
Paris ⟦phone:+33 1 23 45 67 89⟧
Berlin ⟦phone:+49 30 12345678⟧ ok
⟦phone:+86 138 0013 8000⟧
⟦phone:+91 98765 43210⟧,
⟦phone:+61 412 345 678⟧
⟦phone:+971 50 123 4567⟧
⟦phone:+34 612 34 56 78⟧
⟦phone:+4915123456789⟧
text me ⟦phone:+65 9123 4567⟧!
주민등록번호 ⟦resident_number:850312-1223458⟧
주민번호는⟦resident_number:921231-2345670⟧이고
⟦resident_number:010203-3123451⟧ 학생
⟦resident_number:7511082120035⟧
RRN: ⟦resident_number:680417-1104526⟧.
⟦resident_number:040229-4123456⟧ 윤년생
⟦resident_number:990101 1000017⟧
본인 ⟦resident_number:991231 - 2567899⟧ 확인
(⟦resident_number:830715-1567891⟧)
전각은 ⟦resident_number:８５０３１２－１２２３４５８⟧
외국인등록번호 ⟦resident_number:850312-5123459⟧
foreigner ⟦resident_number:921231-6567891⟧
⟦resident_number:010203-7123453⟧
⟦resident_number:050505-8123459⟧ 체류
아기 ⟦resident_number:210105-3111111⟧
신생아 ⟦resident_number:220930-4222222⟧
⟦resident_number:201001-3000000⟧ 이후 발급
외국인등록번호: ⟦resident_number:880808-5999999⟧
주민번호 ⟦resident_number:900101-1234567⟧ (새 번호)
resident registration number ⟦resident_number:900101-2345678⟧
SSN ⟦ssn:536-22-1234⟧
My social is ⟦ssn:078-05-1120⟧.
⟦ssn:219-09-9999⟧
social security number ⟦ssn:401328765⟧
ssn: ⟦ssn:401 32 8765⟧
(⟦ssn:123-45-6789⟧)
미국 번호 ⟦ssn:665-11-2222⟧이요
"ssn": "⟦ssn:001-01-0001⟧"
taxpayer ⟦ssn:772-88-4321⟧, married
SSN=⟦ssn:899-99-9998⟧
card ⟦card:4111 1111 1111 1111⟧
⟦card:4532015112830366⟧ exp 12/27
카드번호⟦card:5454-5454-5454-5454⟧입니다
⟦card:2223000048410010⟧
Amex ⟦card:3714 496353 98431⟧
Amex ⟦card:371449635398431⟧
⟦card:6011 1111 1111 1117⟧
JCB ⟦card:3530-1113-3330-0000⟧
Diners ⟦card:3056 930902 5904⟧
은련 ⟦card:6250940000000001⟧
국내 ⟦card:9490-1234-5678-9013⟧
비씨카드 ⟦card:9420 6123 4567 8903⟧으로 결제
⟦card:5491-6789-0123-4565⟧,
⟦card:4024007123456781⟧로 결제했어요
체크카드:⟦card:4365 0012 3456 7898⟧
⟦card:６５５０　0000　0000　0001⟧
IBAN ⟦iban:DE89 3704 0044 0532 0130 00⟧
⟦iban:GB29NWBK60161331926819⟧
⟦iban:FR14 2004 1010 0505 0001 3M02 606⟧ BIC follows
⟦iban:NL91ABNA0417164300⟧,
⟦iban:ES91 2100 0418 4502 0005 1332⟧.
⟦iban:CH93 0076 2011 6238 5295 7⟧
⟦iban:NO9386011117947⟧
⟦iban:MT84MALT011000012345MTLCAST001S⟧
계좌⟦iban:BE68 5390 0754 7034⟧로 보내세요
⟦iban:AT61 1904 3002 3457 3201⟧ THANKS FOR PAYING
⟦iban:IT60X0542811101000000123456⟧
접속 IP ⟦ip:203.0.113.45⟧
서버⟦ip:192.168.0.12⟧는
from ⟦ip:8.8.8.8⟧ port 53
http://⟦ip:10.0.0.17⟧:8080/x
⟦ip:172.217.25.14⟧에 핑
⟦ip:58.120.33.7⟧ - - [12/Mar/2024]
host=⟦ip:121.78.99.200⟧,
⟦ip:10.0.3.0⟧/24 is our net
아이피 주소는 ⟦ip:1.2.3.4⟧
root@⟦ip:211.45.67.89⟧ 접속
⟦ip:2001:db8:85a3::8a2e:370:7334⟧
[⟦ip:2001:0db8:85a3:0000:0000:8a2e:0370:7334⟧]:443
⟦ip:fe80::1ff:fe23:4567:890a⟧%eth0
inet6 ⟦ip:fd12:3456:789a:1::1⟧
주소 ⟦ip:2404:6800:4005:80b::200e⟧입니다
OPENAI ⟦secret:sk-abcdEFGH1234ijklMNOP5678⟧
export KEY=⟦secret:sk-proj-A1b2C3d4E5f6G7h8I9j0K1l2⟧
⟦secret:sk-ant-api03-Zx9Yw8Vu7Ts6Rq5Po4Nm3Lk2⟧
git clone with ⟦secret:ghp_16C7e42F292c6912E7710c838347Ae178B4a⟧
⟦secret:github_pat_11ABCDEFG0aBcDeFgHiJkL_mnopqrstuv⟧
토큰은⟦secret:hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567⟧입니다
aws ⟦secret:AKIAIOSFODNN7EXAMPLE⟧
aws_secret_access_key = ⟦secret:wJalrXUtnFEMI/K7MDENG/bPxRfiCYzz12345678⟧
slack ⟦secret:xoxb-123456789012-abcdefABCDEF⟧
maps ⟦secret:AIzaSyA1B2C3D4E5F6G7H8I9J0K1L2M3N4O5P6Q⟧
gitlab ⟦secret:glpat-a1B2c3D4e5F6g7H8i9J0⟧
⟦secret:npm_aB1cD2eF3gH4iJ5kL6mN7oP8qR9sT0uV1wX2⟧
stripe ⟦secret:sk_live_4eC39HqLyjWDarjtT1zdp7dc⟧
Authorization: Bearer ⟦secret:eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NSJ9.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U⟧
⟦secret:-----BEGIN RSA PRIVATE KEY-----\\nMIIEpAIBAAKCAQEA7x\\nabc=\\n-----END RSA PRIVATE KEY-----⟧ end
⟦secret:-----BEGIN PRIVATE KEY-----\\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSj⟧
password: ⟦secret:hunter2!!⟧
"password": "⟦secret:S3cure-Pass⟧"
비밀번호: ⟦secret:qwer1234!⟧
비번은 ⟦secret:1q2w3e4r5t⟧ 입니다
DB_PASSWORD=⟦secret:Tr0ub4dor&3x⟧
postgres://admin:⟦secret:Zk8sPq21⟧@db.internal:5432/x
api_key = "⟦secret:9f86d081884c7d659a2feaa0c55ad015⟧"
token: ⟦secret:a8Kd93jLs02mNqP4xT7v⟧
client_secret='⟦secret:Gx7Lq2Vt9Rb4Wm1Zp6Ks⟧'
X-Api-Key: ⟦secret:7c4a8d09ca3762af61e59520943dc26494f8941b⟧
인증키=⟦secret:4d7a4b6c2f8e4b1a9c3d5e6f7a8b9c0d⟧
telegram ⟦secret:123456789:AAHdqTcvCH1vGWJxfSeofSAs0K5PALDsaw1⟧
사업자등록번호 ⟦business_number:124-81-00998⟧
⟦business_number:220-81-23455⟧ 주식회사
사업자번호:⟦business_number:1018612346⟧
(⟦business_number:503-82-23454⟧)
상호 whet, ⟦business_number:617-15-43214⟧, 대표
등록번호⟦business_number:306-21-98765⟧입니다
⟦business_number:212-34-56780⟧
tax no. ⟦business_number:417-05-67897⟧
면허번호 ⟦driving_licence:11-12-345678-90⟧
⟦driving_licence:28-05-123456-11⟧ 운전면허
운전면허증⟦driving_licence:13-99-654321-02⟧입니다
서울 ⟦driving_licence:04-123456-78⟧
경기 ⟦driving_licence:95-654321-10⟧ 1종 보통
⟦driving_licence:21-18-000123-45⟧
여권번호 ⟦passport:M12345678⟧
여권:⟦passport:M123A4567⟧
passport no. ⟦passport:M87654321⟧
US passport ⟦passport:533380006⟧
Passport number: ⟦passport:C01234567⟧
여권 번호는 ⟦passport:S98765432⟧입니다
국민은행 ⟦bank_account:123456-78-901234⟧
계좌 ⟦bank_account:110-123-456789⟧ 신한
계좌번호:⟦bank_account:3333-01-1234567⟧
농협 ⟦bank_account:302-0123-4567-81⟧ 홍길동
우리은행⟦bank_account:1002-345-678901⟧로
입금은 ⟦bank_account:100-2345-678901⟧ 토스뱅크
계좌 ⟦bank_account:11012345678901⟧
account number ⟦bank_account:000123456789⟧
routing number ⟦bank_account:021000021⟧
우체국 ⟦bank_account:012345-02-123456⟧
고객센터 1544-0000 말고 ⟦phone:010-6677-8899⟧로 연락 바랍니다
김철수(⟦phone:010-2345-0987⟧, ⟦email:chulsoo.kim@samsung.com⟧)
⟦resident_number:921231-2345670⟧인데 맞나요
내 카드 ⟦card:5454545454545454⟧번 분실했어
예약자 전화번호는 ⟦phone:01023456789⟧이며 예약번호는 2024031500123입니다
집전화 ⟦phone:053-987-6543⟧ 회사 ⟦phone:02-6543-2109⟧
계좌번호 신한은행 ⟦bank_account:110-345-678901⟧ 예금주 김
카카오뱅크 ⟦bank_account:3333-05-7654321⟧로 입금
하나은행 계좌로 ⟦bank_account:620-123456-789⟧ 보내줘
⟦phone:+82 10 8765 4321⟧ 해외에서
"phone": "⟦phone:555-867-5309⟧"
Contact: John, ⟦phone:(312) 867-5309⟧ ext. 12
ring ⟦phone:+44 7700 900123⟧ or ⟦phone:020 7946 0018⟧
My SSN is ⟦ssn:412-56-7890⟧ and DOB 01/02/1980
ip: ⟦ip:45.33.32.156⟧
nmap scanned ⟦ip:45.33.32.156⟧, ⟦ip:104.26.10.78⟧
export HF_TOKEN=⟦secret:hf_QwErTyUiOpAsDfGhJkLzXcVbNm12345678⟧
config: {"apiKey": "⟦secret:3f9a8b7c6d5e4f3a2b1c0d9e8f7a6b5c⟧"}
jwt=⟦secret:eyJhbGciOiJSUzI1NiIsInR5cCI6IkpXVCJ9.eyJpc3MiOiJodHRwczovL2EuY29tIn0.c2lnbmF0dXJlX2hlcmVfMTIz⟧
the password for the wifi is ⟦secret:blue42horse!⟧
와이파이 비밀번호는 ⟦secret:home2024!!⟧ 이에요
IBAN: ⟦iban:PL61 1090 1014 0000 0712 1981 2874⟧
사업자 ⟦business_number:220-81-23455⟧ 대표 김
운전면허 ⟦driving_licence:22-07-987654-31⟧ 갱신
passport ⟦passport:M45678912⟧ expires 2030
⟦email:이메일@회사.한국⟧
⟦email:a_b-c.d@mail.co.jp⟧さん
⟦ip:2a00:1450:4001:81b::200e⟧
"""

NOT = """
주문번호 20240115-0001234
주문번호: 2024011512345678
주문 번호 A010-1234-5678 확인
주문번호 4532015112830367
운송장 6012-3456-7890
운송장번호 123456789012
송장 345678901234입니다
상품코드 8801234567890
바코드 8801021000015
바코드 8809123456789 찍어 주세요
ISBN 978-3-16-148410-0
ISBN 979-11-6224-000-0
ISBN-10 0-306-40615-2
ISBN 9788966262281
ISSN 1234-5678
2024-01-15에 만나요
2024.01.15 10:30
날짜는 20240115입니다
2024년 1월 15일 오후 3시 30분
1999-12-31 23:59:59.123456
2024-01-15T10:30:00+09:00
Tue, 15 Jan 2024 10:30:00 +0900
20240115103000
1705312200000
1700000000
가격은 1,234,567원
12,345,678,901원
총 1234567890원
$1,000,000.00
USD 1234567.89
1억 2345만 6789원
환율 1,345.50
3.14159265358979
0.010123456789
1.01012345678e-5
-1234567.8901
+1000000 points
+100,000,000원
+12.5%
+1234567
x+1234567890=0
1.2.3.4 Introduction
섹션 1.2.3.4 참고
section 10.2.3.4
version 10.0.19.1
v1.22.333.44
버전은 12.0.1.7입니다
Chrome/99.0.1.22 Safari
package==1.20.3.14
lib-1.2.33.44.jar
tool 2.10.3.4-beta
firmware 10.1.2.3
127.0.0.1:8000
0.0.0.0:80
255.255.255.0
999.300.1.1
1.2.3.4.5
1.2.3
256.1.2.3
3.11.7
torch 2.13.0+cpu
CUDA 12.4.1
OID 1.3.6.1.4.1.311
std::vector<int>
a::b::c
12:30:45
00:1A:2B:3C:4D:5E
beef::cafe
dead:beef
::1
fade::dead
시간은 10:20:30:40
1:2:3:4
sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
md5 5d41402abc4b2a76b9719d911017c592
commit 7c4a8d09ca3762af61e59520943dc26494f8941b
550e8400-e29b-41d4-a716-446655440000
12345678-1234-1234-1234-123456789012
0x1234567890abcdef
#01012345678
id_01012345678
ORD01012345678
01012345678901
01010101010
0110 1100 0101
00000000000
11111111111
999999-9999999
123456-7890123
901301-1234567
900231-1234567
850312-1223459
850312-1223457
850312-2223458
921231-2345671
8503121223459
010203-3123452
900101-1234567
850312-5123458
921231-6567892
법인등록번호 110111-0123456
법인 110111-1234563
법인등록번호 850312-1223458
850312-9223458
850312-0223458
4111 1111 1111 1112
4111-1111-1111-1113
4532015112830367
5454 5454 5454 5455
3714 496353 98432
6011111111111118
1234 5678 9012 3456
9876-5432-1098-7654
0000 0000 0000 0000
1111-1111-1111-1111
4111 1111 1111 111
41111111111111111111
7992739871300000
id 411111111111111123
4111.1111.1111.1111
file_4111111111111111.txt
0.4111111111111111
9490123456789013
30569309025904
DE88 3704 0044 0532 0130 00
GB29NWBK60161331926818
FR15 2004 1010 0505 0001 3M02 606
DE89 3704 0044 0532 0130
XX12 3456 7890 1234
AB12 CDEF GHIJ KLMN
MODEL SM12 3456 7890
KR12 3456 7890 1234 5678
000-12-3456
666-12-3456
900-12-3456
123-00-4567
123-45-0000
123-456-789
123-45-67890
124-81-00999
124-81-00997
220-81-23456
101-86-12345
1018612346
000-00-00000
12-3456-7890
123 45 6789
401328765
1588-1234
1577-0000로 전화
1600-1234
112에 신고
119
114 안내
911
555-1234
1592-1598년 임진왜란
1998-2024
200-300-4000
100-200-3000
123-456-7890
012-345-6789
000-0000-0000
(123) 456-7890
415-055-2671
415-555-267
1-2-3-4-5-6-7-8
1 2 3 4 5 6 7 8 9 10
10 20 30 40 50 60
100 200 300 400
415 555 2671
4155552671
0212345678
02 345 6789
031-12-34567
090-1234-5678
010-123-4567
010-1234-567
010-1234-56789
2010-1234-5678
1-010-1234-5678
버스 3-010 1234 번
좌석 02-1234
99-12-345678-90
11-12-345678-9
04-123456-78
우편번호 06236
우편번호 123-456
98101-1234
M12345678
M123A4567
C01234567
모델 S12345678
passport photo 35x45
여권 사진 3장
533380006
110-123-456789
3333-01-1234567
은행에서 2024-01-15에
계좌가 3개
은행 영업시간 09:00-16:00
account 12 months
농협 2023-2024
account manager since 2019
@hong
@user@mastodon
foo@bar
user@localhost
icon@2x.png
logo@3x.jpg
lodash@4.17.21
@angular/core@12.0.0
q@k.T
x@W.mT
out = x@w.sum(dim=1)
x@w.to(device)
git@github.com:user/repo.git
a@b.c
a @ b.com
name@.com
email@domain
hello@world!
$ 5 @ 3.com
@@ -1,5 +1,7 @@
at example.com
look (at example.com)
path/to/file@v1.2.3
2 apples @ $1.50
sk-learn is a package
sk-xxxxxxxxxxxxxxxxxxxxxxxx
sk-your-api-key-here-please
task-1234567890abcdefghijkl
hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
hf_hub_download(repo_id)
ghp_short
AKIA1234
eyJhbGciOi
api_key = os.environ["OPENAI_API_KEY"]
api_key="YOUR_API_KEY_GOES_HERE_1"
api_key: <your key here>
token = tokenizer.convert_ids_to_tokens
token: string
max_tokens=4096
tokens per second: 123456789
password: required
password=os.getenv("DB_PASSWORD")
The password is incorrect
password must be at least 8 characters
passwords: changeme
Reset your password: https://example.com/reset1
비밀번호는 8자리 이상
비밀번호: 영문과 숫자 조합
비밀번호를 잊었어요
토큰은 3개입니다
인증번호 123456
키는 175cm입니다
열쇠를 잃어버렸다
secret: a long walk
the secret is patience
secret garden
-----BEGIN PUBLIC KEY-----
-----BEGIN CERTIFICATE-----
https://example.com:8080/path
http://localhost:3000/@user
postgres://user:password@localhost/db
redis://:6379
키 180 몸무게 75
1번 2번 3번 4번 5번 6번 7번
3.1운동 1919년
10-0 승리
5-4-3-2-1
12/25/2024
01/02/2003 04:05
37.5665, 126.9780
37.566535,126.977969
N 37° 33' 59"
GPS 127.0276368
사건번호 2019다123456
2020가합512345
대법원 2018. 10. 30. 선고 2013다61381
56626720691 + 1646615806005 = 1903242526696
publicKeyToken="43cb1e8e7a352766"
입금 102015-12-09 5,000,000
계좌 000000-0000000
KOSPI 2,650.12
100000000000000000000
1234567890123456789
ㅋㅋㅋ 100번 봤다
별점 9.5/10
7 + 8 = 15, 15 * 3 = 45
(3)(4)(5)(6)(7)(8)(9)
8-900-1234
RAL 9010-1234
KC 60335-1-2345
FDA 21 CFR 1040.10
IEEE 802.11-2020
RFC 2606-1999
H.264/MPEG-4
A4 210x297
070
02
송장번호 6543-2109-8765 조회
사번 20190123 비번 초기화
모델명 SM-G991N 일련번호 R3CR10ABCDE
좌표 35.1796, 129.0756
학번 2019-12345
통장 잔액 12,345,678원
2023. 3. 15. 선고 2022도12345 판결
등기번호 1234567890123
제1조 제2항 제3호
판매량 010203개
numpy 1.26.4, pandas 2.2.0.1
upgrade from 4.18.0.553 to 4.18.0.600
order #1234-5678-9012-3456 shipped
tracking 1Z999AA10123456784
UPC 036000291452
invoice 100-2345-6789
ISBN 0-19-852663-6
DOI 10.1000/182
arXiv:2306.05685
scores: 98 87 76 65 54 43 32 21
phone model 3310-2017
call 911 or 119 now
2 + 2 = 4, 10 * 10 = 100, 1000 * 1000 = 1000000
lat=40.712776 lon=-74.005974
tokenizer.model_max_length=131072
tokens: [101, 2054, 2003, 102]
token=None
passwd=$PASSWORD
secret_key = get_random_secret_key()
contact us: info[at]example[dot]com
@Override public void f()
import x from '@scope/pkg'
user@host:~$ ls
00:00:5e:00:53:af
12:34:56.789
"""
